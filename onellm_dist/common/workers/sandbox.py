"""The limits of one sample in a worker: its memory, and what the worker says about itself.

A worker writes what it is doing into a small piece of memory that it shares with its parent
process, which reads it to end a sample that takes too long, and after the worker has died.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from onellm_dist.common.errors import MachineError

SAMPLE_SECONDS = 60.0
"""Default of the time that a sample may take to decode, in seconds."""
SAMPLE_MB = 1500
"""Default of the memory that a sample may need, in MiB."""
IDLE, READING, DECODING, HANDING_OVER = range(4)
"""What a worker does. IDLE: it waits for a task, or puts a result together."""
_STATUS = struct.Struct("<qqqd")
_STATM = Path("/proc/self/statm")
_DATA_FIELD = 5
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


class OutOfMemoryError(MachineError):
    """An allocation failed while a sample was read."""


class WorkerStatus(NamedTuple):
    """What a worker is doing."""

    phase: int
    task: int
    """Number of the task in the order of the pool."""
    sample: int
    """Position of the sample in the task."""
    cpu_seconds: float
    """CPU time of the process when it began to decode the sample."""


class StatusMemory:
    """Shared memory for the status of one worker; made before the worker is forked."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _STATUS.size)

    def write(self, status: WorkerStatus) -> None:
        """Write the status (in the worker)."""
        _STATUS.pack_into(self._memory, 0, *status)

    def read(self) -> WorkerStatus:
        """Read the status.

        While the worker runs, what is read may mix two states; believe it if it is read twice.
        """
        return WorkerStatus(*_STATUS.unpack_from(self._memory, 0))


class Sandbox:
    """Watches over the samples of a process; without `status` and a limit it does nothing.

    Args:
        status: where the process writes what it is doing.
        memory_mb: memory in MiB that a sample may use beyond what the process has; 0: any amount.
    """

    def __init__(self, status: StatusMemory | None = None, memory_mb: int = 0) -> None:
        self._status = status
        self._limit = memory_mb << 20
        self._task = 0
        self._index = -1
        self._phase = IDLE

    @property
    def is_limited(self) -> bool:
        """Whether a failed allocation means that the sample is too large, not the machine full."""
        return self._limit > 0 and not _is_overcommit_strict()

    def begin(self, task: int) -> None:
        """Begin with a task."""
        self._task = task
        self.enter(IDLE)

    def enter(self, phase: int, sample: int = -1) -> None:
        """Write what the process does now."""
        self._phase = phase
        if self._status is not None:
            cpu = time.process_time()
            self._status.write(WorkerStatus(phase, self._task, sample, cpu))

    @contextlib.contextmanager
    def sample(self, index: int) -> Iterator[None]:
        """Limit the memory of a sample that is read and decoded within the context.

        Raises:
            OutOfMemoryError: an allocation failed.
        """
        if self._status is None:
            yield
            return
        self._index = index
        self.enter(READING, index)
        _active.append(self)
        try:
            with self._limit_memory():
                yield
        except MemoryError as error:
            raise OutOfMemoryError(f"MemoryError: {error}") from error
        finally:
            _active.pop()
        self.enter(IDLE)  # not after an exception: the worker may end of it

    @contextlib.contextmanager
    def _limit_memory(self) -> Iterator[None]:
        if not self._limit:
            yield
            return
        old = resource.getrlimit(resource.RLIMIT_DATA)
        self._set_memory_limit(old[1])
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, old)

    def _set_memory_limit(self, hard: int) -> None:
        soft = get_data_bytes() + self._limit
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    @contextlib.contextmanager
    def lift(self) -> Iterator[None]:
        """Lift the limits of the sample within the context."""
        phase = self._phase
        self.enter(IDLE)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if self._limit:
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        yield
        if self._limit:
            self._set_memory_limit(hard)
        self.enter(phase, self._index)

    def decode(self) -> None:
        """Start the clock of the sample: its bytes are here, what follows is its own work."""
        if self._status is not None:
            self.enter(DECODING, self._index)

    def read(self) -> None:
        """Stop the clock of the sample: it waits for bytes again."""
        self.enter(READING, self._index)


_active: list[Sandbox] = []
"""The sandbox whose sample this process reads now."""


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Count what is done within the context as the time of the sample that is read now, if any.

    The sample's bytes are here; reading them is the disk's time.
    """
    if not _active:
        yield
        return
    _active[-1].decode()
    yield
    _active[-1].read()


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """Lift the limits of the sample that is read now, to load something that all samples share."""
    with _active[-1].lift() if _active else contextlib.nullcontext():
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library says that an allocation failed."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch raises a RuntimeError, cv2 an error of its own.
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def get_data_bytes() -> int:
    """Bytes of private memory that this process may write, which RLIMIT_DATA counts."""
    pages = int(_STATM.read_bytes().split()[_DATA_FIELD])
    return pages * resource.getpagesize()


def _is_overcommit_strict() -> bool:
    """Whether the kernel refuses memory that it does not have: then any process may be refused."""
    try:
        return _OVERCOMMIT.read_text("utf-8").strip() == "2"
    except OSError:
        return False
