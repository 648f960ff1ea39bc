"""Who builds which shard task: a worker pool on one machine, any number of machines that share it.

A process leases a task by locking its file (the system releases the lock when the process dies,
however it dies), or owns it by its number where an `ArrayTask` says that the process is one of
several. Two builders of one task would write the same bytes, so a file system without locks costs
work and nothing else.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.progress import Progress
from onellm_dist.shards.build.plan import ShardTask
from onellm_dist.shards.build.prepare import PreparedSample
from onellm_dist.shards.build.sample_pool import Preparation
from onellm_dist.shards.build.task import (
    BuildCounts,
    BuildJob,
    TaskRecord,
    build_shard_task,
    read_record,
)
from onellm_dist.shards.storage.paths import StoragePath

LEASES = "leases"
"""Folder of the lock files of an unfinished build."""


@dataclass(frozen=True)
class ArrayTask:
    """This process is number `index` of `count`, and builds every `count`-th shard task.

    The processes may be tasks of a Slurm array, or ranks of one srun.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> ArrayTask:
        """Parse `3/16`: number 3 of 0 .. 15.

        Raises:
            UsageError: the text is anything else.
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
    """A lease that this process holds, until `release`."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lease back: the task is done, or given up."""
        if self._descriptor is not None:
            with suppress(OSError):  # closing is not enough: forked workers have it open too
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


def acquire_lease(base: StoragePath, name: str, *, wait_for_it: bool = False) -> Lease | None:
    """Lock `base/leases/name`.

    Returns:
        None if another process holds the lease. In a remote store every lease is granted.
    """
    if not isinstance(base, Path):
        return Lease(None)
    descriptor = os.open(base / LEASES / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait_for_it else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # no locks here: at worst a task is built twice, to the same bytes
        pass
    return Lease(descriptor)


def build_shard_tasks(
    job: BuildJob, *, workers: int, task: ArrayTask, bar: Progress[object], counts: BuildCounts
) -> None:
    """Build every shard task that is not done and that no other process is building.

    Args:
        job: the build.
        workers: processes.
        task: this process's share.
        bar: the progress bar, in raw samples.
        counts: all samples are counted here.

    Raises:
        TooManyFailuresError: too many samples are bad.
        OneLLMError: a worker process died, or the input changed.
    """
    pending = list[ShardTask]()
    for one in job.plan.tasks:
        record = read_record(job.base, one, job.plan)
        if record is not None:
            counts.add_record(record)
            bar.advance(one.raw_samples)
        elif one.number % task.count == task.index:
            pending.append(one)
    counts.check()
    if len(pending) < 2 * workers or workers == 1:
        with Preparation(job.plan, workers=workers) as preparation:
            _build_in_turn(job, pending, bar, counts, preparation)
        return
    # spawn: what this process has open and cached stays its own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(job,)
    ) as pool:
        try:
            _build_in_parallel(job, pending, bar, counts, pool, workers)
        except BrokenProcessPool as error:
            raise OneLLMError(
                "a worker process of the builder died (killed, or out of memory).",
                "its samples would be missing.",
                "run again with fewer workers to save memory; finished shards are kept.",
            ) from error


def _build_in_turn(
    job: BuildJob,
    tasks: Iterable[ShardTask],
    bar: Progress[object],
    counts: BuildCounts,
    preparation: Preparation,
) -> None:
    """Build one task after the other in this process, with the samples of all workers."""
    for task in tasks:
        lease = acquire_lease(job.base, f"{task.number:06d}")
        if lease is None:
            continue
        try:
            # Another process may have finished it since the list was made.
            if read_record(job.base, task, job.plan) is None:
                with closing(preparation.prepare(job.read_raw_samples(task))) as prepared:
                    build_shard_task(task, job, _show_progress(prepared, bar, counts), counts)
        finally:
            lease.release()


def _show_progress(
    samples: Iterator[PreparedSample], bar: Progress[object], counts: BuildCounts
) -> Iterator[PreparedSample]:
    for sample in samples:
        yield sample
        bar.advance()
        if counts.failures:
            bar.note(f"{counts.failures} bad")


def _build_in_parallel(
    job: BuildJob,
    tasks: list[ShardTask],
    bar: Progress[object],
    counts: BuildCounts,
    pool: ProcessPoolExecutor,
    workers: int,
) -> None:
    """Let each worker build whole tasks; this process holds their leases."""
    running: dict[Future[TaskRecord], Lease] = {}
    left = iter(tasks)
    try:
        while True:
            for task in left:
                lease = acquire_lease(job.base, f"{task.number:06d}")
                if lease is not None:
                    running[pool.submit(_build_in_worker, task)] = lease
                if len(running) == workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(future).release()
                record = future.result()
                counts.add_record(record)
                bar.advance(record.raw_samples)
                bar.note(f"{counts.failures} bad" if counts.failures else "")
                counts.check()
    finally:
        for future, lease in running.items():
            future.cancel()
            lease.release()


_jobs: list[tuple[BuildJob, Preparation]] = []
"""In a worker process: the build that it works for, and the process that decodes for it."""


def _start_worker(job: BuildJob) -> None:
    _jobs.append((job, Preparation(job.plan, workers=1)))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    # torch's own threads would compete for the cores that the workers share.
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """End this process with its parent, which after a kill cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _build_in_worker(task: ShardTask) -> TaskRecord:
    job, preparation = _jobs[0]
    done = read_record(job.base, task, job.plan)
    if done is not None:
        return done
    counts = BuildCounts(job.plan.total, job.plan.settings.max_failures)
    with closing(preparation.prepare(job.read_raw_samples(task))) as prepared:
        return build_shard_task(task, job, prepared, counts)
