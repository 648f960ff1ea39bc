"""The loader: micro-batches of one rank in order, read ahead by worker processes that never change what is read."""

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
"""Signals that a cluster sends to every process of a job: the training process decides, its workers go on reading."""


class Loader:
    """Iterates (MicroBatch, PackedBatch) over steps first_step .. last_step - 1 of one rank. Use it as a context manager.

    Args:
        plan: the run's plan.
        world_size: number of ranks.
        rank: this rank.
        first_step: the first step, 0 for a new run.
        last_step: the step behind the last one.
        workers: reading processes, 0: this one; the recipe's `data.workers` where not given.
        skipped_samples: see Reader.
        pin: page-locked batches; where there is a GPU, if not given.

    Raises (while iterating):
        OneLLMError: whatever the plan or the reader raises, also in a worker.
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
            _Micros(Reader(plan.corpus, skipped_samples)),
            sampler=_Schedule(
                plan, world_size, rank, range(first_step, last_step), max(1, self._workers)
            ),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=plan.config.prefetch if self._workers else None,
            collate_fn=_as_is,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # of its own: starting workers must not draw from the run's generator
            pin_memory=torch.cuda.is_available() if pin is None else pin,
        )
        self._running: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[tuple[MicroBatch, PackedBatch]]:
        self.close()
        self._running = iter(self._loader)
        atexit.register(
            self.close
        )  # before multiprocessing's own, which would wait for workers that nobody told to end
        try:
            while self._running is not None:
                try:
                    micro, outcome = next(self._running)
                except StopIteration:
                    return
                if isinstance(outcome, OneLLMError):
                    raise outcome
                yield micro, outcome
        finally:
            self.close()

    def close(self) -> None:
        """Ends the workers."""
        self._running = None  # torch ends the workers when their iterator goes
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


class _Schedule:
    """The micro-steps of one rank in order, each with the one that the same worker will get next; torch's word is sampler.

    (torch 2.15 hands items to workers in turn. Where it does not, bytes are fetched ahead in vain, and the batches are the same.)
    """

    def __init__(self, plan: Plan, world_size: int, rank: int, steps: range, workers: int) -> None:
        self._plan, self._world_size, self._rank, self._steps, self._workers = (
            plan,
            world_size,
            rank,
            steps,
            workers,
        )

    def __iter__(self) -> Iterator[_Task]:
        waiting: deque[MicroBatch] = deque()
        for step in self._steps:
            for micro in self._plan.step(step, self._world_size).ranks[self._rank]:
                waiting.append(micro)
                if len(waiting) > self._workers:
                    yield _Task(waiting.popleft(), waiting[-1])
        while waiting:
            yield _Task(waiting.popleft(), None)


class _Task(NamedTuple):
    micro: MicroBatch
    ahead: MicroBatch | None


class _Micros(Dataset[Any]):
    """A map from task to batch. An error is handed over as a value: torch would wrap its message in a trace."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, task: _Task) -> tuple[MicroBatch, PackedBatch | OneLLMError]:
        micro, ahead = task
        try:
            return micro, self._reader.read(micro, ahead)
        except OneLLMError as error:
            return micro, error


def _as_is(item: Any) -> Any:
    return item


def _ignore_signals(worker: int) -> None:
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
