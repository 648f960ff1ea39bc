"""Logging with the rank in front, for everything outside the command line's own output."""

from __future__ import annotations

import logging
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    _TextHandler = logging.StreamHandler[TextIO]
else:
    _TextHandler = logging.StreamHandler  # takes no type before Python 3.11

from onellm_dist.common.secrets import mask_text

ROOT = "onellm_dist"
ONCE = {"once": True}
"""`extra` of a record that every rank would write alike: rank 0's is shown."""
BLOCKED_MS = 1000
"""How long a write waits for a stream that does not take it."""
_CHUNK = 1000
"""Characters of a write: their bytes fit into a pipe that can be written to (4096)."""
_blocked: set[int] = set()


class _Format(logging.Formatter):
    """INFO as the bare message; other levels with their name. Secrets are masked."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return mask_text(f"{self._prefix}{level}{message}")


class _CurrentStream(_TextHandler):
    """Writes to whatever `sys.stdout` or `sys.stderr` is at the time, and never ends a run."""

    def __init__(self, *, errors: bool) -> None:
        self._errors = errors
        super().__init__()

    @property
    def stream(self) -> TextIO:
        return sys.stderr if self._errors else sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignored: the stream is looked up at every record."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless nobody reads the stream."""
        try:
            write_unless_blocked(self.stream, self.format(record) + self.terminator)
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Drop a record that cannot be written (a closed pipe, a full disk)."""


def _warnings(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _information(record: logging.LogRecord) -> bool:
    return not _warnings(record)


def _is_own(record: logging.LogRecord) -> bool:
    return not getattr(record, "once", False)


def write_unless_blocked(stream: TextIO, text: str) -> bool:
    """Write text to a stream that may be a pipe or a terminal.

    A pipe that nobody reads, or a terminal on which Ctrl-S was pressed, would block the process for
    ever. Here it has a second; after that, text is dropped until the stream takes some again.

    Returns:
        Whether all of it was written. It is not either where the stream is closed or its disk full.
    """
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # no file: a notebook, a test
        descriptor = -1
    try:
        for start in range(0, len(text), _CHUNK):
            if descriptor >= 0 and not _can_write(descriptor):
                return False
            stream.write(text[start : start + _CHUNK])
            stream.flush()
    except (OSError, ValueError):
        return False
    return True


def _can_write(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    patience = 0 if descriptor in _blocked else BLOCKED_MS
    if poll.poll(patience):  # a closed pipe is ready too: the write says so
        _blocked.discard(descriptor)
        return True
    _blocked.add(descriptor)
    return False


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass `__name__`."""
    return logging.getLogger(name)


def configure_logging(*, rank: int = 0, world_size: int = 1, level: int = logging.INFO) -> None:
    """Send the package's records to the terminal: up to INFO on stdout, warnings on stderr.

    Args:
        rank: put in front of each line where there are several ranks and this is not rank 0.
        world_size: number of ranks.
        level: the lowest level shown; ranks other than 0 show warnings and errors alone.
    """
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    prefix = f"rank {rank}: " if world_size > 1 and rank else ""
    for errors in (False, True):
        handler = _CurrentStream(errors=errors)
        handler.setFormatter(_Format(prefix))
        handler.addFilter(_warnings if errors else _information)
        if rank:
            handler.addFilter(_is_own)
        logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    logger.propagate = False
