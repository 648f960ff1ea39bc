"""What was written stays: bytes and names forced to the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

TAIL_BYTES = 1 << 16


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries (names made and renamed in it), to the disk.

    Raises:
        OSError: it is not there, or the disk refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mend_tail(path: Path) -> None:
    """Take a last line that a kill cut short from a file of JSON lines: what is appended next would be lost with it.

    A last line that lacks its newline alone stays. Nobody else may be writing the file; one that is not there is left so.

    Raises:
        OSError: the disk refuses.
    """
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail, start = b"", end
        while start > 0 and b"\n" not in tail:
            start = max(0, start - TAIL_BYTES)
            file.seek(start)
            tail = file.read(end - start)
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return
        try:
            json.loads(torn)
        except ValueError:
            file.truncate(end - len(torn))
        else:
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
