"""Writing files so that under its final name a file is either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

ASIDE = ".aside"
"""Suffix of a file that is being written; left behind only by a crash."""


def aside(path: Path) -> Path:
    """The name under which `path` is written before it is renamed."""
    return path.with_name(path.name + ASIDE)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` aside, syncs it and renames it to `path`; a failure leaves nothing behind."""
    temporary = aside(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
