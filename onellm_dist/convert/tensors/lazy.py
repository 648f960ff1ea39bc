"""Tensors that are not read yet: readers make them, mappings rearrange them, writers stream them.

A lazy tensor knows its shape and dtype. Its values are read when a writer asks: in blocks of at
most BLOCK bytes where the bytes lie in a file in the wanted order, else all at once.
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
"""Bytes read, scanned, hashed and written at once: they stay in the processor's cache meanwhile."""
READ_BYTES = 64 << 20
"""Bytes of one read call."""

_BITS = {
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
}
"""Dtype -> (integer of its size, mask without the sign, smallest pattern that is not finite)."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that can be read later.

    Attributes:
        shape: shape of what `read` gives.
        dtype: dtype of what `read` gives.
        load: reads all of it.
        stream: yields its bytes in row-major order as 1-D uint8 tensors of complete elements. Each
            is valid until the next is asked for (they may share memory). None: only `load` reads.
        window: reads elements [start, end) of the flattened tensor without the others. None: only
            `load` reads.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    stream: Callable[[], Iterator[torch.Tensor]] | None = None
    window: Callable[[int, int], LazyTensor] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """All values, contiguous."""
        return self.load().reshape(self.shape).contiguous()

    def read_blocks(self) -> Iterator[torch.Tensor]:
        """Yield the tensor's bytes in row-major order, as 1-D uint8 tensors of at most BLOCK bytes.

        Each block is valid until the next is asked for.
        """
        if self.stream is not None:
            yield from self.stream()
        elif self.numel:
            yield from _to_bytes(self).split(BLOCK)

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """Make a lazy tensor of these elements in another shape.

        Raises:
            ValueError: the shape has another number of elements.
        """
        if math.prod(shape) != self.numel:
            raise ValueError(
                f"shape {tuple(shape)} has another number of elements than {self.shape}"
            )
        return LazyTensor(tuple(shape), self.dtype, self.load, self.stream, self.window)

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """Make a lazy tensor of these values in another dtype, block by block.

        A value that becomes infinite is found by the writer.
        """
        if dtype == self.dtype:
            return self

        def stream() -> Iterator[torch.Tensor]:
            for block in self.read_blocks():
                yield block.view(self.dtype).to(dtype).view(torch.uint8)

        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype), stream)

    def map(
        self, function: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int] | None = None
    ) -> LazyTensor:
        """The result of a function of all values.

        Args:
            function: must keep the dtype.
            shape: shape of the result; default: the same.
        """
        return LazyTensor(
            self.shape if shape is None else tuple(shape), self.dtype, lambda: function(self.read())
        )

    def elements(self, start: int, end: int) -> LazyTensor:
        """Elements [start, end) of the flattened tensor, 1-D."""
        if self.window is not None:
            return self.window(start, end)
        return LazyTensor((end - start,), self.dtype, lambda: self.read().reshape(-1)[start:end])

    def rows(self, start: int, end: int) -> LazyTensor:
        """Rows [start, end) of the first dimension."""
        row = math.prod(self.shape[1:])
        return self.elements(start * row, end * row).reshape((end - start, *self.shape[1:]))


Tensors = dict[str, LazyTensor]
"""Name -> tensor."""
Shapes = dict[str, tuple[int, ...]]
"""Name -> shape."""


def from_tensor(tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is in memory already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def concatenate(parts: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    """Several tensors as one, along a dimension.

    Args:
        parts: at least one tensor, all of one dtype.
        dim: the dimension.
    """
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)

    def stream() -> Iterator[torch.Tensor]:
        for part in parts:
            yield from part.read_blocks()

    def load() -> torch.Tensor:
        joined = torch.empty(shape, dtype=parts[0].dtype)
        start = 0
        for part in parts:
            joined.narrow(dim, start, part.shape[dim]).copy_(part.read())
            start += part.shape[dim]
        return joined

    return LazyTensor(tuple(shape), parts[0].dtype, load, stream if dim == 0 else None)


class DataFile:
    """A file whose byte ranges are read as tensors; several threads may use it at once.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_bytes(self, offset: int, length: int) -> torch.Tensor:
        """[length] uint8, from byte `offset` on.

        Raises:
            OneLLMError: the file ends before.
        """
        buffer = torch.empty(length, dtype=torch.uint8)
        self._read_into(buffer, offset)
        return buffer

    def _read_into(self, buffer: torch.Tensor, offset: int) -> None:
        view = memoryview(cast(Any, buffer.numpy()))
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done : done + READ_BYTES]], offset + done)
            if count == 0:
                raise OneLLMError(
                    f"{self.path} ends at byte {offset + done}",
                    "a tensor is cut short.",
                    "download or copy it again.",
                )
            done += count

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> LazyTensor:
        """The tensor whose row-major bytes start at byte `offset`.

        Args:
            offset: its first byte.
            shape: its shape.
            dtype: its dtype.
        """
        length = math.prod(shape) * dtype.itemsize

        def stream() -> Iterator[torch.Tensor]:
            # One buffer for all blocks: new memory costs as much as the reading.
            buffer = torch.empty(min(BLOCK, length), dtype=torch.uint8)
            for start in range(0, length, BLOCK):
                block = buffer[: min(BLOCK, length - start)]
                self._read_into(block, offset + start)
                yield block

        def load() -> torch.Tensor:
            return self.read_bytes(offset, length).view(dtype).reshape(tuple(shape))

        def window(start: int, end: int) -> LazyTensor:
            return self.tensor(offset + start * dtype.itemsize, (end - start,), dtype)

        return LazyTensor(tuple(shape), dtype, load, stream, window)


def is_finite(block: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a block of bytes holds neither NaN nor infinity; integers never do.

    Args:
        block: 1-D uint8.
        dtype: dtype of its values.
    """
    if dtype not in _BITS or not len(block):
        return True
    integer, magnitude, limit = _BITS[dtype]
    return int(block.view(integer).bitwise_and(magnitude).max()) < limit


def is_bitwise_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors are equal bit for bit, in the same shape and dtype."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.stream is None or b.stream is None:
        return not a.numel or torch.equal(_to_bytes(a), _to_bytes(b))
    pairs = zip(read_equal_blocks(a), read_equal_blocks(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def _to_bytes(tensor: LazyTensor) -> torch.Tensor:
    return tensor.read().reshape(-1).view(torch.uint8)


def read_equal_blocks(tensor: LazyTensor) -> Iterator[torch.Tensor]:
    """The bytes in blocks of exactly BLOCK bytes; the last one may be shorter."""
    held: list[torch.Tensor] = []
    length = 0
    for block in tensor.read_blocks():
        held.append(block.clone())
        length += len(block)
        while length >= BLOCK:
            joined = torch.cat(held)
            yield joined[:BLOCK]
            held = [joined[BLOCK:]]
            length -= BLOCK
    if length:
        yield torch.cat(held)
