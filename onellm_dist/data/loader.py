"""The loader: micro-batches of one rank in order, read ahead by worker processes.

The number of workers never changes what is read.
"""

from __future__ import annotations

import atexit
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from onellm_dist.common.errors import OneLLMError
from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.packed import PackedBatch

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a cluster sends to every process of a job. The training process decides what they
mean; its workers keep reading."""


class Loader:
    """Iterates over the (MicroBatch, PackedBatch) pairs of one rank. Use it as a context manager.

    Args:
        plan: the run's plan.
        world_size: number of ranks.
        rank: this rank.
        first_step: first step to load; 0 for a new run.
        last_step: the step after the last one to load.
        workers: number of reading processes; 0 reads in this one. Default: `data.workers`.
        skipped_samples: sample id to reason, of samples that are not tried again (see Reader).
        pin: whether batches are page-locked; default: if there is a GPU.

    Raises:
        OneLLMError: while iterating; whatever the plan or the reader raises, also in a worker.
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
    ) -> None:
        self._workers = plan.config.workers if workers is None else workers
        self._loader: DataLoader[Any] = DataLoader(
            _MicroBatches(Reader(plan.corpus, skipped_samples)),
            sampler=_Schedule(
                plan, world_size, rank, range(first_step, last_step), max(1, self._workers)
            ),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=plan.config.prefetch if self._workers else None,
            collate_fn=_return_unchanged,
            worker_init_fn=_ignore_signals,
            # its own generator: starting workers must not draw from the run's
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available() if pin is None else pin,
        )
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[tuple[MicroBatch, PackedBatch]]:
        self.close()
        self._iterator = iter(self._loader)
        # Runs before multiprocessing's own exit handler, which would wait for the workers forever.
        atexit.register(self.close)
        try:
            while self._iterator is not None:
                try:
                    micro, batch = next(self._iterator)
                except StopIteration:
                    return
                if isinstance(batch, OneLLMError):
                    raise batch
                yield micro, batch
        finally:
            self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._iterator = None  # torch ends the workers when their iterator is deleted
        atexit.unregister(self.close)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Task(NamedTuple):
    """What a worker is asked for: a micro-batch, and the one it will be asked for next."""

    micro: MicroBatch
    ahead: MicroBatch | None


class _Schedule:
    """The tasks of one rank in order (what torch calls a sampler).

    torch 2.15 gives items to workers in turn, so the next task of a worker is known. If that
    changes, reading ahead saves nothing, but the batches stay the same.
    """

    def __init__(self, plan: Plan, world_size: int, rank: int, steps: range, workers: int) -> None:
        self._plan = plan
        self._world_size = world_size
        self._rank = rank
        self._steps = steps
        self._workers = workers

    def __iter__(self) -> Iterator[_Task]:
        waiting: deque[MicroBatch] = deque()
        for step in self._steps:
            for micro in self._plan.step(step, self._world_size).ranks[self._rank]:
                waiting.append(micro)
                if len(waiting) > self._workers:
                    yield _Task(waiting.popleft(), waiting[-1])
        while waiting:
            yield _Task(waiting.popleft(), None)


class _MicroBatches(Dataset[Any]):
    """A map from task to batch; errors are returned, because torch would wrap their message."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, task: _Task) -> tuple[MicroBatch, PackedBatch | OneLLMError]:
        micro, ahead = task
        try:
            return micro, self._reader.read(micro, ahead)
        except OneLLMError as error:
            return micro, error


def _return_unchanged(item: Any) -> Any:
    return item


def _ignore_signals(worker: int) -> None:
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
