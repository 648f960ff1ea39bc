"""Peak memory of a process and everything it starts, shared pages counted once."""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

import psutil

GIB = 1 << 30


class PeakMemory:
    """Samples the process tree in a thread while it is entered.

    Memory is the sum of the processes' PSS (proportional set size: a page that several share is split between them), so
    shared memory counts once; RSS stands in where PSS may not be read.

    Args:
        every: seconds between samples; a shorter peak can be missed.
        pid: root of the tree; this process where not given.
    """

    def __init__(self, every: float = 0.5, pid: int | None = None) -> None:
        self.every = every
        self.root = psutil.Process(os.getpid() if pid is None else pid)
        self.samples: list[tuple[float, int]] = []
        """(time.monotonic(), bytes) of each sample."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def peak(self, since: float = 0.0) -> int:
        """Most bytes in any sample taken after `since` (a time.monotonic())."""
        return max((size for at, size in self.samples if at >= since), default=0)

    def _sample(self) -> None:
        while True:
            self.samples.append((time.monotonic(), tree_bytes(self.root)))
            if self._stop.wait(self.every):
                return


def tree_bytes(root: psutil.Process) -> int:
    """Bytes of a process and its descendants."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_process_bytes(process) for process in processes)


def _process_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:
        try:
            return int(process.memory_info().rss)
        except psutil.Error:
            return 0
    except psutil.Error:  # it ended meanwhile
        return 0
