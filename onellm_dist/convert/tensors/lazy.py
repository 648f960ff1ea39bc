"""Tensors that are not read yet: what readers make, mappings rearrange and writers stream, one at a time.

A lazy tensor knows its shape and dtype; its values are read when a writer asks, in blocks of at most BLOCK bytes where the
bytes lie in a file in the order in which they are wanted, else whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from onellm_dist.common.errors import OneLLMError

BLOCK = 1 << 20
"""Bytes read, scanned, hashed and written at once: they stay in the processor's cache between these."""

_BITS = {
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
}
"""Dtype -> (integer of its size, everything but the sign, smallest pattern that is not finite)."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that can be read later.

    Attributes:
        shape, dtype: of what `read` gives.
        load: reads it whole.
        stream: yields its bytes in row-major order as 1-D uint8 tensors, each a whole number of elements, and each only until
            the next is asked for (they may share memory); None where only `load` can tell.
        window: elements [start, end) of the flattened tensor, read without the others; None where only `load` can tell.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    stream: Callable[[], Iterator[torch.Tensor]] | None = None
    window: Callable[[int, int], LazyTensor] | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.numel * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor, contiguous."""
        return self.load().reshape(self.shape).contiguous()

    def blocks(self) -> Iterator[torch.Tensor]:
        """Its bytes in row-major order: 1-D uint8 tensors of at most BLOCK bytes, each only until the next is asked for."""
        if self.stream is not None:
            yield from self.stream()
        elif self.numel:
            flat = self.read().reshape(-1).view(torch.uint8)
            yield from flat.split(BLOCK)

    def reshaped(self, shape: Sequence[int]) -> LazyTensor:
        """The same elements in another shape."""
        if math.prod(shape) != self.numel:
            raise ValueError(f"{self.shape} has not as many elements as {tuple(shape)}")
        return LazyTensor(tuple(shape), self.dtype, self.load, self.stream, self.window)

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """The same values in another dtype, block by block; a value that becomes infinite is found by the writer."""
        if dtype == self.dtype:
            return self

        def stream() -> Iterator[torch.Tensor]:
            for block in self.blocks():
                yield block.view(self.dtype).to(dtype).view(torch.uint8)

        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype), stream)

    def mapped(
        self, function: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int] | None = None
    ) -> LazyTensor:
        """`function` of the whole tensor, which must keep the dtype; `shape`: of its result where it is another."""
        return LazyTensor(
            self.shape if shape is None else tuple(shape), self.dtype, lambda: function(self.read())
        )

    def elements(self, start: int, end: int) -> LazyTensor:
        """Elements [start, end) of the flattened tensor, 1-D."""
        if self.window is not None:
            return self.window(start, end)
        return LazyTensor((end - start,), self.dtype, lambda: self.read().reshape(-1)[start:end])

    def rows(self, start: int, end: int) -> LazyTensor:
        """Rows start to end of the first dimension."""
        row = math.prod(self.shape[1:])
        return self.elements(start * row, end * row).reshaped((end - start, *self.shape[1:]))


def of_tensor(tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is in memory already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def concatenated(parts: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    """Several tensors as one, along `dim`."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)

    def stream() -> Iterator[torch.Tensor]:
        for part in parts:
            yield from part.blocks()

    def load() -> torch.Tensor:
        whole = torch.empty(shape, dtype=parts[0].dtype)
        start = 0
        for part in parts:
            whole.narrow(dim, start, part.shape[dim]).copy_(part.read())
            start += part.shape[dim]
        return whole

    return LazyTensor(tuple(shape), parts[0].dtype, load, stream if dim == 0 else None)


class DataFile:
    """A file whose byte ranges are read as tensors; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def bytes_at(self, offset: int, length: int) -> torch.Tensor:
        """[length] uint8 from `offset` on.

        Raises:
            OneLLMError: the file ends before.
        """
        buffer = torch.empty(length, dtype=torch.uint8)
        self._read_into(buffer, offset)
        return buffer

    def _read_into(self, buffer: torch.Tensor, offset: int) -> None:
        view, done = memoryview(cast(Any, buffer.numpy())), 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done : done + (64 << 20)]], offset + done)
            if got == 0:
                raise OneLLMError(
                    f"{self.path} ends at byte {offset + done}",
                    "a tensor is cut short.",
                    "download or copy it again.",
                )
            done += got

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> LazyTensor:
        """The tensor whose row-major bytes start at `offset`."""
        length = math.prod(shape) * dtype.itemsize

        def stream() -> Iterator[torch.Tensor]:
            buffer = torch.empty(
                min(BLOCK, length), dtype=torch.uint8
            )  # one for all blocks: new memory costs as much as the reading
            for start in range(0, length, BLOCK):
                block = buffer[: min(BLOCK, length - start)]
                self._read_into(block, offset + start)
                yield block

        def load() -> torch.Tensor:
            return self.bytes_at(offset, length).view(dtype).reshape(tuple(shape))

        def window(start: int, end: int) -> LazyTensor:
            return self.tensor(offset + start * dtype.itemsize, (end - start,), dtype)

        return LazyTensor(tuple(shape), dtype, load, stream, window)


def finite(block: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a block of uint8 holds neither NaN nor infinity, read as `dtype` (true for integers)."""
    if dtype not in _BITS or not len(block):
        return True
    integer, magnitude, limit = _BITS[dtype]
    return int(block.view(integer).bitwise_and(magnitude).max()) < limit


def same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors are equal bit for bit, shapes and dtypes included."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.stream is None or b.stream is None:
        return (
            torch.equal(
                a.read().reshape(-1).view(torch.uint8), b.read().reshape(-1).view(torch.uint8)
            )
            if a.numel
            else True
        )
    left, right = equal_blocks(a), equal_blocks(b)
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def equal_blocks(tensor: LazyTensor) -> Iterator[torch.Tensor]:
    """The bytes in blocks of exactly BLOCK, the last one less."""
    held: list[torch.Tensor] = []
    length = 0
    for block in tensor.blocks():
        held.append(block.clone())
        length += len(block)
        while length >= BLOCK:
            whole = torch.cat(held)
            yield whole[:BLOCK]
            held, length = [whole[BLOCK:]], length - BLOCK
    if length:
        yield torch.cat(held)
