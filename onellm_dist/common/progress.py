"""Progress for people: a bar with an ETA on a terminal, plain lines elsewhere (log files, CI).

    for sample in progress(samples, "Checking media"):          # length from len(), or pass total=
        ...

    with progress(5000, "Building shards", unit="samples") as bar:   # a number: advance it yourself
        bar.advance()                # or bar.advance(16)
        bar.note("3 quarantined")    # shown after the numbers until the next note

`total=None` counts without an ETA, and `enabled=False` is silent (for ranks other than 0, and for
tests). Bars may be nested. Everything goes to stderr, so that a command's output stays clean.
Plain lines appear at most every `every` seconds, and once at the end.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from onellm_dist.common.output import write_error

T = TypeVar("T")
PLAIN_SECONDS = 10.0
"""Seconds between plain lines."""


def format_seconds(seconds: float) -> str:
    """Format a duration for people: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _Terminal:
    """The one live display of the process; nested bars are further lines of it.

    (rich allows one live display at a time.)
    """

    _lock = threading.Lock()
    _display: RichProgress | None = None
    _users = 0

    @classmethod
    def acquire(cls) -> RichProgress:
        """Return the display, starting it for its first user."""
        with cls._lock:
            if cls._display is None:
                cls._display = RichProgress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[unit]}"),
                    TimeElapsedColumn(),
                    TextColumn("ETA"),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"),
                    console=Console(stderr=True),
                )
                cls._display.start()
            cls._users += 1
            return cls._display

    @classmethod
    def release(cls) -> None:
        """Give the display back; its last user stops it."""
        with cls._lock:
            cls._users -= 1
            if cls._users == 0 and cls._display is not None:
                cls._display.stop()
                cls._display = None


class Progress(Generic[T]):
    """One running task, made by `progress()`.

    It is a context manager, and can be iterated over if it was given an iterable.
    """

    def __init__(
        self,
        items: Iterable[T],
        total: int | None,
        description: str,
        unit: str,
        enabled: bool,
        every: float,
    ) -> None:
        self.description = description
        self.total = total
        self.done = 0
        """Number of things done so far."""
        self._items = items
        self._unit = unit
        self._enabled = enabled
        self._every = every
        self._note = ""
        self._display: RichProgress | None = None
        self._task = TaskID(0)
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress[T]:
        self._started = self._last_line = time.monotonic()
        if self._enabled and sys.stderr.isatty():
            self._display = _Terminal.acquire()
            self._task = self._display.add_task(
                self.description, total=self.total, unit=self._unit, note=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._display is not None:
            # The finished line stays visible: rich prints the last state when the display stops.
            self._display.stop_task(self._task)
            self._display = None
            _Terminal.release()
        elif self._enabled:
            self._print_line(ended="stopped" if kind else "done")

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.advance()

    def advance(self, count: int = 1) -> None:
        """Record that `count` more things are done."""
        self.done += count
        if self._display is not None:
            self._display.update(self._task, completed=self.done)
        elif self._enabled and time.monotonic() - self._last_line >= self._every:
            self._print_line()

    def note(self, text: str) -> None:
        """Show a few words after the numbers until the next note."""
        self._note = text
        if self._display is not None:
            self._display.update(self._task, note=text)

    def _print_line(self, ended: str = "") -> None:
        now = time.monotonic()
        elapsed = now - self._started
        self._last_line = now
        of = f"/{self.total} ({100 * self.done / self.total:.0f}%)" if self.total else ""
        words = [f"{self.description}: {self.done}{of} {self._unit}".rstrip()]
        if self.done and elapsed > 0:
            words.append(f"{self.done / elapsed:.3g}/s")
        if ended:
            words.append(f"{ended} after {format_seconds(elapsed)}")
        elif self.total and self.done:
            left = elapsed * (self.total - self.done) / self.done
            words.append(f"ETA {format_seconds(left)}")
        write_error(", ".join([*words, self._note] if self._note else words))


@overload
def progress(
    work: int | None,
    description: str,
    *,
    total: int | None = None,
    unit: str = "",
    enabled: bool = True,
    every: float = PLAIN_SECONDS,
) -> Progress[Any]: ...
@overload
def progress(
    work: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    unit: str = "",
    enabled: bool = True,
    every: float = PLAIN_SECONDS,
) -> Progress[T]: ...
def progress(
    work: Iterable[Any] | int | None,
    description: str,
    *,
    total: int | None = None,
    unit: str = "",
    enabled: bool = True,
    every: float = PLAIN_SECONDS,
) -> Progress[Any]:
    """Show progress over `work`.

    Args:
        work: an iterable to go through, or the number of things to do (then use `with` and
            `advance`); None if the number is unknown.
        description: what is being done, such as "Building shards".
        total: number of things to do if `work` is an iterable without a length.
        unit: what is counted ("samples"), shown after the number.
        enabled: False shows nothing.
        every: seconds between plain lines if stderr is not a terminal.
    """
    if work is None or isinstance(work, int):
        return Progress((), work if total is None else total, description, unit, enabled, every)
    if total is None and isinstance(work, Sized):
        total = len(work)
    return Progress(work, total, description, unit, enabled, every)
