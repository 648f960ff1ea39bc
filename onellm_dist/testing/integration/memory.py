"""Peak memory of a process and everything it starts, with shared pages counted once."""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

import psutil

GIB = 1 << 30


class PeakMemory:
    """Measures the process tree in a thread, from entering to leaving its `with` block.

    Memory is the sum of the processes' PSS (proportional set size: a page that several processes
    share is split between them), so shared memory counts once. Where PSS may not be read, RSS
    replaces it.

    Args:
        every: seconds between measurements; a shorter peak can be missed.
        pid: root of the tree; default: this process.
    """

    def __init__(self, every: float = 0.5, pid: int | None = None) -> None:
        self.every = every
        self.root = psutil.Process(os.getpid() if pid is None else pid)
        self.samples: list[tuple[float, int]] = []
        """(time.monotonic(), bytes) of each measurement."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._measure, name="peak-memory", daemon=True)

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

    def get_peak(self, since: float = 0.0) -> int:
        """Most bytes in any measurement after `since` (a time.monotonic())."""
        return max((size for at, size in self.samples if at >= since), default=0)

    def _measure(self) -> None:
        while True:
            self.samples.append((time.monotonic(), measure_tree(self.root)))
            if self._stop.wait(self.every):
                return


def measure_tree(root: psutil.Process) -> int:
    """Bytes of a process and its descendants."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_measure_process(process) for process in processes)


def _measure_process(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:
        try:
            return int(process.memory_info().rss)
        except psutil.Error:
            return 0
    except psutil.Error:  # it has ended meanwhile
        return 0
