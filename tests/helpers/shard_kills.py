"""Processes that are killed while they build."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("fork")
"""A spawned process imports torch first, for every kill."""


class KilledAt:
    """Kills the process at the n-th file operation (open, rename, mkdir, remove) below a folder."""

    def __init__(self, folder: Path, at: int, counter: Any) -> None:
        self.folder, self.at, self.counter = str(folder), at, counter

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in (
            "open",
            "os.rename",
            "os.mkdir",
            "os.remove",
            "os.rmdir",
        ) and self.folder in str(arguments[0]):
            self.counter.value += 1
            if self.counter.value == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def make_killable(out: Path, at: int, build: Callable[[], object]) -> tuple[Any, Any]:
    """Make a process that builds `out` and is killed at operation `at` (0: never).

    Returns:
        The process, not started, and its count of file operations.
    """
    counter = CONTEXT.Value("i", 0)
    return CONTEXT.Process(target=_run, args=(out, at, counter, build)), counter


def _run(out: Path, at: int, counter: Any, build: Callable[[], object]) -> None:
    sys.addaudithook(KilledAt(out.parent / f".{out.name}.building", at, counter))
    build()
