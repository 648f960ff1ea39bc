"""The loader workers of a rank: who reads what, and what happens when one hangs or dies.

Micro-batches go to workers in turn, so their order depends on nothing. A sample that makes its
worker crash, hang or run out of memory is read once more in a fresh worker; if that ends the same
way, the sample is skipped with its reason, as one that cannot be decoded. A worker that dies for
another reason is replaced, a few times; then the run ends, and no sample is held responsible.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from onellm_dist.common.errors import MachineError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.processes import count_kills_for_memory, get_cpu_seconds, is_asleep
from onellm_dist.data.handover import make_pair, receive, send
from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.data.sandbox import (
    DECODING,
    HANDING_OVER,
    READING,
    Sandbox,
    StatusMemory,
    WorkerStatus,
)
from onellm_dist.data.worker import (
    CANNOT_HAND_OVER,
    OUT_OF_MEMORY,
    BatchReader,
    LoaderTask,
    fork_worker,
    make_memory_error,
)

POLL_S = 0.25
"""Seconds between two looks at workers while a batch is waited for."""
IDLE_SHARE = 0.02
"""A process that uses less than this share of a core hangs, if it is asleep."""
MOST_REPLACED = 3
"""Workers that may die for reasons of their own within `REPLACED_S` before the run ends."""
REPLACED_S = 600.0
CLOSE_S = 5.0
"""Seconds that workers are waited for once they have been killed."""

log = get_logger(__name__)


@dataclass(eq=False)
class _Worker:
    pid: int
    connection: socket.socket
    status: StatusMemory
    pending: deque[tuple[int, LoaderTask]] = field(default_factory=deque)
    """What it was asked for and has not handed over, with its number."""
    results: deque[Any] = field(default_factory=deque)
    over_time: bool = False
    """Whether it was killed because a sample took too long."""
    seen: WorkerStatus | None = None
    cpu_seconds: float = 0.0
    idle_seconds: float = 0.0


class WorkerPool:
    """Reads micro-batches in worker processes, in order.

    Create and use it in one thread.

    Args:
        reader: what the workers read with.
        tasks: what they read, in order; the next task of a worker is `workers` tasks later.
        workers: number of processes, at least 1.
        prefetch: tasks that each process is given ahead.
        sample_seconds: time that a sample may take to decode: CPU time, or time asleep; 0: any.
        sample_mb: memory in MiB that a sample may use; 0: any.
    """

    def __init__(
        self,
        reader: BatchReader,
        tasks: Iterator[LoaderTask],
        *,
        workers: int,
        prefetch: int,
        sample_seconds: float = 0.0,
        sample_mb: int = 0,
    ) -> None:
        self._reader = reader
        self._tasks = tasks
        self._sample_seconds = sample_seconds
        self._sample_mb = sample_mb
        self._asked = 0
        self._given = 0
        self._deaths: Counter[str] = Counter()
        self._replaced: deque[float] = deque(maxlen=MOST_REPLACED)
        """When workers died that were not reading a sample."""
        self._looked = time.monotonic()
        self._kills = count_kills_for_memory()
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
            for _ in range(prefetch * workers):
                self._ask()
        except BaseException:
            self.close()
            raise

    def next(self) -> tuple[MicroBatch, Any] | None:
        """The next micro-batch and what its worker returned; None after the last.

        Raises:
            MachineError: a worker could not hand over its batch, or died for want of memory.
        """
        if self._given == self._asked:
            return None
        worker = self._workers[self._given % len(self._workers)]
        self._receive(0)
        self._looked = time.monotonic()
        while not worker.results:
            self._receive(POLL_S)
            self._check_limits()
        self._given += 1
        found: tuple[MicroBatch, Any] = worker.results.popleft()
        self._ask()
        return found

    def close(self) -> None:
        """End the workers; later calls do nothing.

        One that the kernel cannot end now, as when its disk does not answer, is left behind.
        """
        for worker in self._workers:  # first: one whose socket is closed would say that it failed
            _kill(worker.pid)
        deadline = time.monotonic() + CLOSE_S
        for worker in self._workers:
            worker.connection.close()
            while not _reap(worker.pid) and time.monotonic() < deadline:
                time.sleep(0.005)
        self._workers.clear()

    def _start(self) -> _Worker:
        ours, theirs = make_pair()
        status = StatusMemory()
        others = [worker.connection for worker in self._workers]

        def close_others() -> None:
            for connection in (*others, ours):
                connection.close()

        with warnings.catch_warnings():  # Python 3.12 warns where the process has threads
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = fork_worker(self._reader, Sandbox(status, self._sample_mb), theirs, close_others)
        theirs.close()
        return _Worker(pid, ours, status)

    def _ask(self) -> None:
        """Give the next task to the worker whose turn it is."""
        task = next(self._tasks, None)
        if task is None:
            return
        worker = self._workers[self._asked % len(self._workers)]
        worker.pending.append((self._asked, task))
        self._asked += 1
        self._send(worker, worker.pending[-1])

    def _send(self, worker: _Worker, request: tuple[int, LoaderTask]) -> None:
        try:
            send(worker.connection, request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died: found when its answer is read
        except OSError as error:
            raise make_memory_error(f"{type(error).__name__}: {error}") from None

    def _receive(self, timeout: float) -> None:
        """Take what has arrived, after at most `timeout` seconds; replace workers that died."""
        poll = select.poll()
        waiting = {w.connection.fileno(): w for w in self._workers if w.pending}
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(round(1000 * timeout)):
            worker = waiting[descriptor]
            try:
                number, found = receive(worker.connection)
            except ConnectionResetError:
                pass  # it died with requests unread; what it had sent comes next, then the end
            except EOFError:
                self._replace(worker)
            except OSError as error:
                raise make_memory_error(f"{type(error).__name__}: {error}") from None
            else:
                asked, task = worker.pending.popleft()
                assert asked == number
                worker.results.append((task.micro, found))

    def _check_limits(self) -> None:
        """Kill the workers whose sample takes too long."""
        now = time.monotonic()
        # A process that was suspended has not hung: no look counts for more than two.
        passed = min(now - self._looked, 2 * POLL_S)
        self._looked = now
        for worker in self._workers:
            if _has_ended(worker.pid) and not _is_readable(worker.connection):
                self._replace(worker)  # a process that it started holds its socket open
            elif self._sample_seconds and worker.pending and not worker.over_time:
                self._check_time(worker, passed)

    def _check_time(self, worker: _Worker, passed: float) -> None:
        status = worker.status.read()
        try:
            cpu = get_cpu_seconds(worker.pid)
        except OSError:  # it has just died
            return
        if status.phase != DECODING or status != worker.seen:
            worker.seen = status
            worker.cpu_seconds = cpu
            worker.idle_seconds = 0.0
            return
        if cpu - worker.cpu_seconds < IDLE_SHARE * passed and is_asleep(worker.pid):
            worker.idle_seconds += passed
        else:
            worker.idle_seconds = 0.0
        worker.cpu_seconds = cpu
        if max(cpu - status.cpu_seconds, worker.idle_seconds) > self._sample_seconds:
            worker.over_time = True
            _kill(worker.pid)

    def _replace(self, worker: _Worker) -> None:
        """Start a fresh worker in the place of one that died, with the same tasks.

        Raises:
            MachineError: its death is not a sample's fault, and it was not the first.
        """
        _kill(worker.pid)  # one that has only closed its socket
        code = _wait(worker.pid)
        worker.connection.close()
        status = worker.status.read()
        cause = self._describe_death(worker, code)
        sample_id = self._find_sample(worker, status)
        self._check_machine(worker, code, cause, sample_id)
        if sample_id is None:
            self._replaced.append(time.monotonic())
            log.warning("a loader worker %s; it is replaced", cause)
        else:
            self._deaths[sample_id] += 1
            if self._deaths[sample_id] > 1:
                self._reader.skip(sample_id, f"{sample_id}: its worker {cause}, twice")
            log.warning(
                "sample %s: its loader worker %s; %s",
                sample_id,
                cause,
                "it is skipped" if self._deaths[sample_id] > 1 else "it is read once more",
            )
        fresh = self._start()
        fresh.pending = worker.pending
        fresh.results = worker.results
        self._workers[self._workers.index(worker)] = fresh
        for request in fresh.pending:
            self._send(fresh, request)

    def _check_machine(self, worker: _Worker, code: int, cause: str, sample_id: str | None) -> None:
        """Raise where the machine is at fault, or where too many workers died."""
        kills, before = count_kills_for_memory(), self._kills
        self._kills = kills
        killed = code == -signal.SIGKILL
        if code == CANNOT_HAND_OVER or (worker.status.read().phase == HANDING_OVER and not killed):
            raise make_memory_error(f"it {cause}")
        if killed and not worker.over_time and kills > before:
            doing = f"it was reading {sample_id}, which need not be large; " if sample_id else ""
            raise MachineError(
                "a loader worker was killed by the kernel, which was out of memory",
                f"{doing}the machine or its container has too little memory for the run.",
                "use fewer loader processes (data.workers) or fewer batches ahead "
                "(data.prefetch), lower data.sample_mb, or give the job more memory.",
            )
        recent = [died for died in self._replaced if time.monotonic() - died < REPLACED_S]
        if sample_id is None and len(recent) >= MOST_REPLACED:
            raise MachineError(
                f"a loader worker {cause}, and {len(recent)} others had died shortly before",
                "none of them was decoding a sample at the time; something ends them from outside.",
                "look for the out-of-memory killer in the kernel's log (dmesg), for limits of the "
                "job, and for failing disks; then start again.",
            )

    def _describe_death(self, worker: _Worker, code: int) -> str:
        """How a worker ended, for `its worker ...`."""
        if worker.over_time:
            return f"took more than {self._sample_seconds:g} s (data.sample_seconds)"
        if code == OUT_OF_MEMORY:
            return f"needed more than {self._sample_mb} MiB (data.sample_mb)"
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL)"
        if code < 0:
            return f"crashed ({signal.Signals(-code).name})"
        return f"ended with exit code {code}"

    def _find_sample(self, worker: _Worker, status: WorkerStatus) -> str | None:
        """Id of the sample that a worker died over; None: it was not reading one."""
        if status.phase not in (READING, DECODING):
            return None
        task = dict(worker.pending).get(status.micro_batch)
        return None if task is None else self._reader.get_sample_id(task.micro, status.sample)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    try:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, pid, options) is not None
    except ChildProcessError:
        return True


def _is_readable(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reap(pid: int) -> bool:
    """Whether a child has ended and needs no more waiting for."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # somebody else has waited for it
        return True


def _wait(pid: int) -> int:
    """Exit code of a child that has ended or is about to; negative: the signal that ended it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:  # somebody else has waited for it
        return 1
