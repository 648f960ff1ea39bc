"""A pool of workers: who reads which samples, and what happens when a worker hangs or dies.

Tasks go to workers in turn, so their order depends on nothing. A sample that makes its worker
crash, hang or run out of memory is read once more in a fresh worker; if that ends the same way, the
sample is left out with its reason, as one that cannot be decoded. A worker that dies for another
reason is replaced, a few times; then an error is raised, and no sample is held responsible.
"""

from __future__ import annotations

import select
import signal
import socket
import time
import warnings
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from onellm_dist.common.errors import MachineError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.processes import count_kills_for_memory, get_cpu_seconds, is_asleep
from onellm_dist.common.workers import children
from onellm_dist.common.workers.handover import make_pair, receive, send
from onellm_dist.common.workers.process import (
    CANNOT_HAND_OVER,
    OUT_OF_MEMORY,
    SampleReader,
    fork_worker,
)
from onellm_dist.common.workers.sandbox import (
    DECODING,
    HANDING_OVER,
    READING,
    Sandbox,
    StatusMemory,
    WorkerStatus,
)
from onellm_dist.common.workers.words import PoolWords, make_endless_error, make_memory_error

POLL_S = 0.25
"""Seconds between two looks at workers while a result is waited for."""
IDLE_SHARE = 0.02
"""A process that uses less than this share of a core hangs, if it is asleep."""
MOST_REPLACED = 3
"""Workers that may die for reasons of their own within `REPLACED_S` before the pool gives up."""
REPLACED_S = 600.0
CLOSE_S = 5.0
"""Seconds that a pool that is closed waits for the workers that it has killed."""
END_S = 60.0
"""Seconds that a worker may take to end once it is killed, or has closed its connection."""

log = get_logger(__name__)
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Worker:
    pid: int
    connection: socket.socket
    status: StatusMemory
    pending: deque[tuple[int, Any]] = field(default_factory=deque)
    """Requests that the worker has not answered yet, with their numbers."""
    results: deque[Any] = field(default_factory=deque)
    killed_at: float | None = None
    """When the worker was killed because a sample took too long; None: it was not."""
    seen: WorkerStatus | None = None
    cpu_seconds: float = 0.0
    idle_seconds: float = 0.0


class WorkerPool(Generic[Task, Result]):
    """Reads the samples of tasks in worker processes, in order.

    Create and use it in one thread.

    Args:
        reader: what the workers read with.
        tasks: what they read, in order; the next task of a worker is `workers` tasks later.
        words: what workers and limits are called in messages.
        workers: number of processes, at least 1.
        prefetch: tasks that each process is given ahead.
        sample_seconds: time that a sample may take to decode: CPU time, or time asleep; 0: any.
        sample_mb: memory in MiB that a sample may use; 0: any.
    """

    def __init__(
        self,
        reader: SampleReader[Task, Result],
        tasks: Iterable[Task],
        words: PoolWords,
        *,
        workers: int,
        prefetch: int,
        sample_seconds: float = 0.0,
        sample_mb: int = 0,
    ) -> None:
        self._reader = reader
        self._tasks = iter(tasks)
        self._words = words
        self._prefetch = prefetch
        self._sample_seconds = sample_seconds
        self._sample_mb = sample_mb
        self._asked = 0
        self._given = 0
        self._deaths: Counter[Hashable] = Counter()
        self._replaced: deque[float] = deque(maxlen=MOST_REPLACED)
        """When workers died that were not reading a sample."""
        self._looked = time.monotonic()
        self._kills = count_kills_for_memory()
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
            self._ask_ahead()
        except BaseException:
            self.close()
            raise

    def restart(self, tasks: Iterable[Task]) -> None:
        """Read other tasks, with the same workers, after the last of those before."""
        assert self._given == self._asked
        self._tasks = iter(tasks)
        self._ask_ahead()

    def next(self) -> tuple[Task, Result | Exception] | None:
        """Return the next task with its result, or the error that it raised; None after the last.

        Raises:
            MachineError: a worker could not hand over its result, died for want of memory, or does
                not end.
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
        found: tuple[Task, Result | Exception] = worker.results.popleft()
        self._ask()
        return found

    def close(self) -> None:
        """End the workers; later calls do nothing.

        One that the kernel cannot end now, as when its disk does not answer, is left behind.
        """
        for worker in self._workers:  # first: one whose socket is closed would say that it failed
            children.kill(worker.pid)
        deadline = time.monotonic() + CLOSE_S
        for worker in self._workers:
            worker.connection.close()
            while not children.reap(worker.pid) and time.monotonic() < deadline:
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
            sandbox = Sandbox(status, self._sample_mb)
            pid = fork_worker(self._reader, sandbox, theirs, self._words, close_others)
        theirs.close()
        return _Worker(pid, ours, status)

    def _ask_ahead(self) -> None:
        for _ in range(self._prefetch * len(self._workers)):
            self._ask()

    def _ask(self) -> None:
        """Give the next task to the worker whose turn it is."""
        task = next(self._tasks, None)
        if task is None:
            return
        worker = self._workers[self._asked % len(self._workers)]
        worker.pending.append((self._asked, task))
        self._asked += 1
        self._send(worker, worker.pending[-1])

    def _send(self, worker: _Worker, request: tuple[int, Task]) -> None:
        try:
            send(worker.connection, request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died: found when its answer is read
        except OSError as error:
            raise self._make_memory_error(error) from None

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
                raise self._make_memory_error(error) from None
            else:
                asked, task = worker.pending.popleft()
                assert asked == number
                worker.results.append((task, found))

    def _check_limits(self) -> None:
        """Kill the workers whose sample takes too long."""
        now = time.monotonic()
        # A process that was suspended has not hung: no look counts for more than two.
        passed = min(now - self._looked, 2 * POLL_S)
        self._looked = now
        for worker in self._workers:
            ended = children.has_ended(worker.pid)
            if ended and not _is_readable(worker.connection):
                self._replace(worker)  # a process that it started holds its socket open
            elif worker.killed_at is not None:
                if not ended and now - worker.killed_at > END_S:
                    raise make_endless_error(self._words, worker.pid, END_S)
            elif self._sample_seconds and worker.pending:
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
            worker.killed_at = time.monotonic()
            children.kill(worker.pid)

    def _replace(self, worker: _Worker) -> None:
        """Start a fresh worker in the place of one that died, with the same tasks.

        Raises:
            MachineError: its death is not a sample's fault, and it was not the first; or it does
                not end.
        """
        children.kill(worker.pid)  # one that has only closed its socket
        code = children.wait(worker.pid, END_S)
        if code is None:
            raise make_endless_error(self._words, worker.pid, END_S)
        worker.connection.close()
        status = worker.status.read()
        cause = self._describe_death(worker, code)
        sample_id = self._find_sample(worker, status)
        self._check_machine(worker, code, cause, sample_id)
        if sample_id is None:
            self._replaced.append(time.monotonic())
            log.warning("a %s %s; it is replaced", self._words.worker, cause)
        else:
            self._deaths[sample_id] += 1
            if self._deaths[sample_id] > 1:
                self._reader.skip(sample_id, f"its worker {cause}, twice")
            log.warning(
                "sample %s: its %s %s; %s",
                sample_id,
                self._words.worker,
                cause,
                "it is skipped" if self._deaths[sample_id] > 1 else "it is read once more",
            )
        fresh = self._start()
        fresh.pending = worker.pending
        fresh.results = worker.results
        self._workers[self._workers.index(worker)] = fresh
        for request in fresh.pending:
            self._send(fresh, request)

    def _check_machine(
        self, worker: _Worker, code: int, cause: str, sample_id: Hashable | None
    ) -> None:
        """Raise where the machine is at fault, or where too many workers died."""
        words = self._words
        kills, before = count_kills_for_memory(), self._kills
        self._kills = kills
        killed = code == -signal.SIGKILL
        if code == CANNOT_HAND_OVER or (worker.status.read().phase == HANDING_OVER and not killed):
            raise make_memory_error(words, f"it {cause}")
        if killed and worker.killed_at is None and kills > before:
            doing = ""
            if sample_id is not None:
                doing = f"it was reading {sample_id}, which need not be large; "
            raise MachineError(
                f"a {words.worker} was killed by the kernel, which was out of memory",
                f"{doing}the machine or its container has too little memory.",
                f"{words.fewer}, lower {words.megabytes}, or give the job more memory.",
            )
        recent = [died for died in self._replaced if time.monotonic() - died < REPLACED_S]
        if sample_id is None and len(recent) >= MOST_REPLACED:
            raise MachineError(
                f"a {words.worker} {cause}, and {len(recent)} others had died shortly before",
                "none of them was decoding a sample at the time; something ends them from outside.",
                "look for the out-of-memory killer in the kernel's log (dmesg), for limits of the "
                "job, and for failing disks; then start again.",
            )

    def _make_memory_error(self, error: OSError) -> MachineError:
        return make_memory_error(self._words, f"{type(error).__name__}: {error}")

    def _describe_death(self, worker: _Worker, code: int) -> str:
        """How a worker ended, for `its worker ...`."""
        if worker.killed_at is not None:
            return f"took more than {self._sample_seconds:g} s ({self._words.seconds})"
        if code == OUT_OF_MEMORY:
            return f"needed more than {self._sample_mb} MiB ({self._words.megabytes})"
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL)"
        if code < 0:
            return f"crashed ({signal.Signals(-code).name})"
        return f"ended with exit code {code}"

    def _find_sample(self, worker: _Worker, status: WorkerStatus) -> Hashable | None:
        """Id of the sample that a worker died over; None: it was not reading one."""
        if status.phase not in (READING, DECODING):
            return None
        task = dict(worker.pending).get(status.task)
        return None if task is None else self._reader.get_sample_id(task, status.sample)


def _is_readable(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])
