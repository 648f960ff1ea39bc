"""Writing files so that under its final name a file is either whole or not there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from onellm_dist.common.files import sync

ASIDE = ".aside"
"""Suffix of a file that is being written; left behind only by a crash."""


def aside(path: Path) -> Path:
    """The name under which `path` is written before it is renamed."""
    return path.with_name(path.name + ASIDE)


def private_name() -> str:
    """A name that no other process has, on any machine that shares the disk."""
    return f"{socket.gethostname()}-{os.getpid()}"


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` aside, syncs it and renames it to `path`; a failure leaves nothing behind.

    The name aside is this process's own, so that two that write the same file do not write into each other's.
    """
    temporary = aside(path.with_name(f"{path.name}.{private_name()}"))
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
