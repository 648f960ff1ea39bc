"""JSON-lines files that a full disk does not end a run over: lines wait until there is room."""

from __future__ import annotations

import threading
from pathlib import Path

from onellm_dist.common.logging import get_logger

log = get_logger(__name__)
MOST_PENDING = 64 << 20
"""Bytes that wait at most; beyond them new lines are lost."""


class PatientFile:
    """Appends lines; any thread may.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = b""
        self._failing = False
        self._lock = threading.Lock()

    def append(self, line: str) -> None:
        """Append a line, with those that are waiting."""
        with self._lock:
            data = self._pending + line.encode("utf-8")
            try:
                with self._path.open("ab", buffering=0) as out:
                    while data:
                        data = data[out.write(data) :]
            except OSError as error:
                if not self._failing:
                    log.warning(
                        "%s cannot be written: %s. The run continues; lines are kept in memory.",
                        self._path,
                        error.strerror or error,
                    )
                self._failing = True
                self._pending = data if len(data) < MOST_PENDING else self._pending
            else:
                self._pending = b""
                if self._failing:
                    log.info("%s can be written again", self._path)
                self._failing = False
