"""The loader: micro-batches of one rank in order, read ahead by worker processes.

The number of workers never changes what is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType

import torch

from onellm_dist.common.workers.allocator import keep_freed_memory
from onellm_dist.common.workers.pool import WorkerPool
from onellm_dist.data.device_copy import BatchOrError, copy_ahead
from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.data.worker import LOADER, BatchReader, LoaderTask
from onellm_dist.packed import PackedBatch


class Loader:
    """Iterates over the (MicroBatch, PackedBatch) pairs of one rank. Use it as a context manager.

    The values of a `PixelModality` (pictures and maps of them) are pixels (`torch.uint8`, 0 to
    255), all others fp32. The model takes both; `make_input` of `onellm_dist.model.pixels` gives
    what it computes with, which is CLIP's normalisation of the pixels.

    Args:
        plan: the run's plan.
        world_size: number of ranks.
        rank: this rank.
        first_step: first step to load; 0 for a new run.
        last_step: the step after the last one to load.
        workers: number of reading processes; 0 reads in this one, without the limits of a sample
            (`data.sample_seconds`, `data.sample_mb`), and lets it keep memory that it frees (see
            `keep_freed_memory`). Default: `data.workers`.
        skipped_samples: sample id to reason, of samples that are not tried again (see Reader).
        pin: whether batches are page-locked; default: if there is a GPU.
        device: a GPU that pinned batches are copied to, one ahead; default: they stay on the host.

    Raises:
        OneLLMError: while iterating; whatever the plan or the reader raises, also in a worker.
        MachineError: while iterating; a worker could not hand over its batch.
    """

    def __init__(
        self,
        plan: Plan,
        world_size: int,
        rank: int,
        first_step: int,
        last_step: int,
        workers: int | None = None,
        *,
        skipped_samples: Mapping[str, str] | None = None,
        pin: bool | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._workers = plan.config.workers if workers is None else workers
        self._plan = plan
        self._reader = Reader(plan.corpus, skipped_samples)
        self._schedule = _Schedule(
            plan, world_size, rank, range(first_step, last_step), max(1, self._workers)
        )
        self._pin = torch.cuda.is_available() if pin is None else pin
        self._device = device if device is not None and device.type == "cuda" else None
        self._pool: WorkerPool[LoaderTask, PackedBatch] | None = None

    def __iter__(self) -> Iterator[tuple[MicroBatch, PackedBatch]]:
        self.close()
        items = self._read_in_workers() if self._workers else self._read_here()
        for micro, batch in copy_ahead(items, self._device) if self._pin else items:
            if isinstance(batch, Exception):
                raise batch
            yield micro, batch

    def _read_here(self) -> Iterator[BatchOrError]:
        keep_freed_memory()
        for micro, ahead in self._schedule:
            yield micro, self._reader.read(micro, ahead)

    def _read_in_workers(self) -> Iterator[BatchOrError]:
        config = self._plan.config
        pool = self._pool = WorkerPool(
            BatchReader(self._reader),
            self._schedule,
            LOADER,
            workers=self._workers,
            prefetch=config.prefetch,
            sample_seconds=config.sample_seconds,
            sample_mb=config.sample_mb,
        )
        try:
            while self._pool is pool and (item := pool.next()) is not None:
                task, found = item
                yield task.micro, found
        finally:
            pool.close()

    def close(self) -> None:
        """End the worker processes."""
        pool = self._pool
        self._pool = None
        if pool is not None:
            pool.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Schedule:
    """The tasks of one rank in order.

    Workers are given tasks in turn, so the next task of a worker is known.
    """

    def __init__(self, plan: Plan, world_size: int, rank: int, steps: range, workers: int) -> None:
        self._plan = plan
        self._world_size = world_size
        self._rank = rank
        self._steps = steps
        self._workers = workers

    def __iter__(self) -> Iterator[LoaderTask]:
        waiting: deque[MicroBatch] = deque()
        for step in self._steps:
            for micro in self._plan.step(step, self._world_size).ranks[self._rank]:
                waiting.append(micro)
                if len(waiting) > self._workers:
                    yield LoaderTask(waiting.popleft(), waiting[-1])
        while waiting:
            yield LoaderTask(waiting.popleft(), None)
