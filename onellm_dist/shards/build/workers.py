"""Who builds which unit: processes on one machine, and any number of machines that share the output.

A unit is claimed by a lock on its file (released by the system when its holder dies, however it dies), or by its number where
`task` says that this process is one of several (`Task`). Two builders of one unit would write the same bytes, so a file system
without locks costs work and nothing else.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from pathlib import Path

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.progress import Progress
from onellm_dist.shards.build.plan import ShardTask
from onellm_dist.shards.build.prepare import Outcome, prepare
from onellm_dist.shards.build.settings import Settings
from onellm_dist.shards.build.task import Account, Job, Record, build_unit, read_record
from onellm_dist.shards.sources.base import RawSample
from onellm_dist.shards.storage.paths import StoragePath

LEASES = "claims"
_CHUNK = 8
"""Candidates a worker gets at once, where workers share a unit."""
_WINDOW = 4
"""Chunks in flight a worker: bounds the memory of samples that wait for their turn."""


@dataclass(frozen=True)
class Task:
    """This process is number `index` of `count` (a Slurm array's tasks, srun's ranks): it builds every `count`-th unit."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Task:
        """`3/16` -> number 3 of 0 .. 15.

        Raises:
            UsageError: anything else.
        """
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
            raise UsageError(
                f"task {text!r} is not INDEX/COUNT with INDEX from 0 to COUNT - 1.",
                "it says which shards this process builds.",
                "in a Slurm array 0-15: --task $SLURM_ARRAY_TASK_ID/16",
            )
        return cls(int(index), int(count))


class Lease:
    """A held lease; `release` gives it back."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """The unit is done, or given up."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lease(base: StoragePath, name: str, *, wait_for_it: bool = False) -> Lease | None:
    """Locks `base/claims/name`; None: somebody else holds it. In a remote store every lease is granted."""
    if not isinstance(base, Path):
        return Lease(None)
    descriptor = os.open(base / LEASES / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait_for_it else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # no locks here: the worst is that a unit is built twice, to the same bytes
        pass
    return Lease(descriptor)


def build_units(
    job: Job, *, workers: int, task: Task, bar: Progress[object], account: Account
) -> None:
    """Builds every unit that is not done and that nobody else is building.

    Raises:
        TooManyFailures: too many samples are bad.
        OneLLMError: a worker process died, or the input changed.
    """
    pending = list[ShardTask]()
    for unit in job.plan.units:
        record = read_record(job.base, unit, job.plan)
        if record is not None:
            account.take(record)
            bar.advance(unit.raw_samples)
        elif unit.number % task.count == task.index:
            pending.append(unit)
    account.check()
    if workers == 1:
        _one_by_one(job, pending, bar, account, job.prepared)
        return
    # spawn: forking a process that has torch's threads can hang the child.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(job,)
    ) as pool:
        try:
            if len(pending) >= 2 * workers:
                _unit_each(job, pending, bar, account, pool, workers)
            else:
                settings, modalities = job.plan.settings, job.plan.modalities
                _one_by_one(
                    job,
                    pending,
                    bar,
                    account,
                    lambda u: _shared(job.raw_samples(u), modalities, settings, pool, workers),
                )
        except BrokenProcessPool as error:
            raise OneLLMError(
                "a builder's worker process died (killed, out of memory, or crashed in a decoder).",
                "its samples would be missing.",
                "run again with --workers 1 to see where, or with fewer workers to save memory; finished shards are kept.",
            ) from error


def _one_by_one(
    job: Job,
    units: Iterable[ShardTask],
    bar: Progress[object],
    account: Account,
    outcomes: Callable[[ShardTask], Iterator[Outcome]],
) -> None:
    for unit in units:
        held = lease(job.base, f"{unit.number:06d}")
        if held is None:
            continue
        try:
            if (
                read_record(job.base, unit, job.plan) is None
            ):  # somebody may have finished it since the list was made
                build_unit(unit, job, _counted(outcomes(unit), bar, account), account)
        finally:
            held.release()


def _counted(
    outcomes: Iterator[Outcome], bar: Progress[object], account: Account
) -> Iterator[Outcome]:
    for outcome in outcomes:
        yield outcome
        bar.advance()
        if account.failures:
            bar.note(f"{account.failures} bad")


def _shared(
    raw_samples: Iterator[RawSample],
    modalities: tuple[str, ...],
    settings: Settings,
    pool: ProcessPoolExecutor,
    workers: int,
) -> Iterator[Outcome]:
    """The unit's outcomes in order, prepared by all workers together."""
    waiting: deque[Future[list[Outcome]]] = deque()
    try:
        for chunk in iter(lambda: list(islice(raw_samples, _CHUNK)), []):
            waiting.append(pool.submit(_prepare_chunk, chunk, modalities, settings))
            if len(waiting) >= workers * _WINDOW:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _prepare_chunk(
    chunk: list[RawSample], modalities: tuple[str, ...], settings: Settings
) -> list[Outcome]:
    return [prepare(c, modalities, settings) for c in chunk]


def _unit_each(
    job: Job,
    units: list[ShardTask],
    bar: Progress[object],
    account: Account,
    pool: ProcessPoolExecutor,
    workers: int,
) -> None:
    """Each worker builds whole units; this process holds their claims."""
    running: dict[Future[Record], Lease] = {}
    left = iter(units)
    try:
        while True:
            for unit in left:
                held = lease(job.base, f"{unit.number:06d}")
                if held is not None:
                    running[pool.submit(_build_in_worker, unit)] = held
                if len(running) == workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(future).release()
                record = future.result()
                account.take(record)
                bar.advance(record.raw_samples)
                bar.note(f"{account.failures} bad" if account.failures else "")
                account.check()
    finally:
        for future, held in running.items():
            future.cancel()
            held.release()


_jobs: list[Job] = []
"""In a worker process: the one it works for."""


def _start_worker(job: Job) -> None:
    _jobs.append(job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(
        1
    )  # torch's own threads would fight over the cores that the workers share


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers to go."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _build_in_worker(unit: ShardTask) -> Record:
    job = _jobs[0]
    done = read_record(job.base, unit, job.plan)
    if done is not None:
        return done
    return build_unit(
        unit, job, job.prepared(unit), Account(job.plan.total, job.plan.settings.max_failures)
    )
