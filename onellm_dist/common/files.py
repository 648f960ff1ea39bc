"""Files that survive a crash: the one atomic write, syncs, checksums, repair of JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

STAGED = ".staged"
"""Suffix of a file that is still being written; only a crash leaves one behind."""
BLOCK_BYTES = 1 << 22
TAIL_BYTES = 1 << 16


def get_staged_path(path: Path) -> Path:
    """The name under which `path` is written before it is renamed into place."""
    return path.with_name(path.name + STAGED)


def unique_name() -> str:
    """A name that no other process uses, on any machine that shares the disk."""
    return f"{socket.gethostname()}-{os.getpid()}"


class FileStamp(NamedTuple):
    """What distinguishes a file from another one that took its name."""

    modified_ns: int
    size: int


def stamp_file(path: Path) -> FileStamp | None:
    """The stamp of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return FileStamp(found.st_mtime_ns, found.st_size)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries (files created and renamed in it), to the disk.

    Raises:
        OSError: `path` does not exist, or the disk refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    Two processes that write the same file use different temporary names. A failure inside the
    block leaves `path` as it was and removes the temporary file.

    Raises:
        OSError: the disk refuses.
    """
    temporary = get_staged_path(path.with_name(f"{path.name}.{unique_name()}"))
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8); a reader sees the old file or the new one.

    Raises:
        OSError: the disk refuses; `path` is unchanged.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def replace_folder(staged: Path, folder: Path) -> None:
    """Rename a complete, synced folder to `folder`, which may exist.

    A folder of that name is renamed first and removed last; `restore_folder` brings it back if
    the process was killed in between.

    Raises:
        OSError: the disk refuses.
    """
    backup = _backup_path(folder)
    shutil.rmtree(backup, ignore_errors=True)
    if folder.exists():
        folder.rename(backup)
    staged.rename(folder)
    sync(folder.parent)
    shutil.rmtree(backup, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Undo a `replace_folder` that was interrupted before the new folder had its name."""
    backup = _backup_path(folder)
    if backup.is_dir() and not folder.exists():
        backup.rename(folder)


def _backup_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


def sha256_file(*paths: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hex SHA-256 of a file, or of several end to end, read in blocks of 4 MiB.

    Args:
        paths: the files.
        on_bytes: called with the number of bytes of each block, for progress.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK_BYTES))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
                if on_bytes is not None:
                    on_bytes(count)
    return digest.hexdigest()


def repair_last_line(path: Path) -> None:
    """Remove a last line that a kill cut short, so that appended JSON lines start on a fresh line.

    A complete last line that only lacks its newline is kept. No other process may be writing the
    file. A missing file stays missing.

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
