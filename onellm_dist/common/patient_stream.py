"""Output that never blocks: what is printed is written by a thread, and dropped if nobody reads it.

A terminal that was stopped, a pipe whose reader sleeps or has gone, or a full disk behind stdout
must not stop a process that prints now and then.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import stat
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

LIMIT = 10_000
"""Writes that wait at most; where nobody reads them, later ones are dropped and counted."""
STALL_S = 1.0
"""Seconds without a read after which a reader is not waited for."""
DRAIN_S = 5.0
"""Seconds that a process waits at its end for its output to be read."""


class PatientStream(io.TextIOBase):
    """Stands in for `sys.stdout` or `sys.stderr`.

    In a forked process it has no thread: what cannot be written at once is dropped.

    Args:
        stream: the stream that it replaces; it must have a file descriptor.
        threaded: whether a thread writes; else it is as in a forked process.
    """

    def __init__(self, stream: TextIO, *, threaded: bool = True) -> None:
        self._descriptor = stream.fileno()
        self._encoding = stream.encoding or "utf-8"
        self._terminal = stream.isatty()
        self._pid = os.getpid() if threaded else -1
        # A SimpleQueue may be used in a signal handler that has interrupted itself.
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = 0
        self._written = 0
        self._stalled = False
        """Whether the reader has not read for so long that nobody waits for it."""
        self._broken = False
        self._thread = threading.Thread(target=self._write_all, name="output", daemon=True)
        if threaded:
            self._thread.start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream that it replaces."""
        return self._encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return self._terminal

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""

    def write(self, text: str) -> int:
        if os.getpid() != self._pid:
            self._write_or_drop(text)
        elif text and self._has_room():
            self._queue.put(text)
        elif text:
            self._dropped += 1
        return len(text)

    def _has_room(self) -> bool:
        """Whether a text may wait; a reader that is slow, but reads, is waited for."""
        seen, since = self._written, time.monotonic()
        while self._queue.qsize() >= LIMIT:
            if self._written != seen:
                seen, since = self._written, time.monotonic()
                self._stalled = False
            self._stalled = self._stalled or time.monotonic() - since > STALL_S
            if self._stalled:
                return False
            time.sleep(0.001)
        self._stalled = False
        return True

    def drain(self, seconds: float = DRAIN_S) -> None:
        """Wait until everything is written, but not longer than some seconds."""
        if os.getpid() == self._pid:
            self._queue.put(None)
            self._thread.join(seconds)

    def _write_all(self) -> None:
        while (text := self._queue.get()) is not None:
            if self._dropped:
                count = self._dropped
                self._dropped = 0
                text = f"... {count} writes were dropped: nobody read the output ...\n{text}"
            self._write(text)
            self._written += 1

    def _write(self, text: str) -> None:
        data = text.encode(self._encoding, errors="backslashreplace")
        while data and not self._broken:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # the reader has gone, or the disk is full
                self._broken = self._is_closed()
                return

    def _write_or_drop(self, text: str) -> None:
        data = text.encode(self._encoding, errors="backslashreplace")
        with contextlib.suppress(OSError):  # the reader has gone or lags, or the disk is full
            while data and _is_writable(self._descriptor):
                # So much goes into a pipe with room at once.
                data = data[os.write(self._descriptor, data[: select.PIPE_BUF]) :]

    def _is_closed(self) -> bool:
        """Whether no later write can succeed."""
        try:
            os.fstat(self._descriptor)
        except OSError:
            return True
        return False


@contextlib.contextmanager
def patient_output() -> Iterator[None]:
    """Let stdout and stderr never block for the time of the context."""
    before = sys.stdout, sys.stderr
    replace_output()
    try:
        yield
    finally:
        drain_output()
        sys.stdout, sys.stderr = before


def replace_output() -> None:
    """Let stdout and stderr of this process never block from here on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, PatientStream):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):  # captured, or closed
            stream.flush()
            setattr(sys, name, PatientStream(stream))


def drop_unread_output() -> None:
    """Let stdout and stderr of a forked process never block: what nobody reads is dropped.

    Pipes and terminals are opened anew, for what C code writes; other processes keep theirs.
    """
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed, or another user's terminal
            _open_anew(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, PatientStream):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # captured, or closed
                setattr(sys, name, PatientStream(stream, threaded=False))


def _open_anew(descriptor: int) -> None:
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):  # a file would lose its position
        return
    # O_NONBLOCK belongs to what is opened, which the training process shares.
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
    fresh = os.open(f"/proc/self/fd/{descriptor}", flags)
    os.dup2(fresh, descriptor)
    os.close(fresh)


def _is_writable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(0))


def drain_output() -> None:
    """Wait some seconds for what was printed to be written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, PatientStream):
            stream.drain()
        elif stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
