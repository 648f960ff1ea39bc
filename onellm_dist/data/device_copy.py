"""Micro-batches on their way to a GPU, one ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.packed import PackedBatch

BatchOrError = tuple[MicroBatch, Any]
"""A micro-batch, and its batch or an error."""


@dataclass(frozen=True)
class _Copy:
    """A batch that is being copied to a GPU."""

    batch: PackedBatch
    done: torch.cuda.Event

    def use(self) -> PackedBatch:
        """The batch, for the current stream, which waits for the copy; the host does not."""
        stream = torch.cuda.current_stream(self.batch.input_ids.device)
        stream.wait_event(self.done)
        for tensor in self.batch.tensors():
            tensor.record_stream(stream)  # its memory is that of the copying stream
        return self.batch


@cache
def get_copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to a GPU; all loaders share it.

    torch keeps the memory that was freed for its stream alone: with a stream of its own, each
    validation would take new memory.
    """
    return torch.cuda.Stream(device)


def copy_ahead(
    items: Iterator[BatchOrError], device: torch.device | None
) -> Iterator[BatchOrError]:
    """Pin each batch, and copy it to a GPU, in a thread, while the one before it is used.

    Args:
        items: the batches.
        device: the GPU that the batches are copied to, on a stream of its own, so that the copy
            runs beside the work of the batch before; None: they stay in page-locked memory. While
            the next batch is asked for, the GPU holds three: the one that the caller still has, the
            next one, and the one that is being copied.
    """
    current = torch.cuda.current_device()  # a thread begins with GPU 0
    stream = None if device is None else get_copy_stream(device)
    with ThreadPoolExecutor(1, "pin", torch.cuda.set_device, (current,)) as threads:
        last: Future[BatchOrError] | None = None
        for item in items:
            moved = threads.submit(_move, item, device, stream)
            if last is not None:
                yield _finish(last)
            last = moved
        if last is not None:
            yield _finish(last)


def _move(
    item: BatchOrError, device: torch.device | None, stream: torch.cuda.Stream | None
) -> BatchOrError:
    micro, batch = item
    if isinstance(batch, Exception):
        return item
    pinned = batch.pin_memory()
    if device is None or stream is None:
        return micro, pinned
    with torch.cuda.stream(stream):
        return micro, _Copy(pinned.to(device), stream.record_event())


def _finish(moved: Future[BatchOrError]) -> BatchOrError:
    micro, batch = moved.result()
    return micro, batch.use() if isinstance(batch, _Copy) else batch
