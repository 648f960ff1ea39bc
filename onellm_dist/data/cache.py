"""The node-local cache of remote shards (`data.cache_dir`).

It holds chunks of tars, is bounded in size, and is shared by all processes of the node. Writers
take the folder's lock, so the size is counted and never exceeds the limit; readers take no lock. A
chunk is written under a temporary name and renamed, so it appears complete. If a chunk goes bad on
the disk, the CRC-32 in the index reveals it when a part is read, and the chunk is fetched again.
The least recently used chunks are evicted first, a tenth of the limit at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import STAGED, get_staged_path

CHUNK = 4 << 20
"""Bytes of a chunk; the last chunk of a tar is shorter."""
_TOUCH_SECONDS = 60.0
"""A chunk's time of use is updated at most this often."""


class ChunkCache:
    """Chunks by key, in a folder.

    Args:
        folder: a folder on a disk of this node; it is created if necessary.
        limit: maximum size in bytes.

    Raises:
        UsageError: the folder is not writable, or the limit is below four chunks.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 4 * CHUNK:
            raise UsageError(
                f"data.cache_gb={limit / 1e9:g} is less than {4 * CHUNK} bytes",
                "the cache could hold nothing.",
                "raise it.",
            )
        self._chunks = folder / "chunks"
        self._lock = folder / "lock"
        self._used = folder / "used"
        self._limit = limit
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # as private as the data
            self._chunks.mkdir(exist_ok=True)
            self._lock.touch()
        except OSError as error:
            raise UsageError(
                f"data.cache_dir={folder}: {error.strerror or error}",
                "remote shards are to be cached there.",
                "use a folder that this user can write to, or remove the key.",
            ) from error

    def get(self, key: str, start: int, end: int) -> bytes | None:
        """Return the bytes [start, end) of a chunk, or None if the cache does not have them."""
        path = self._get_path(key)
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                data = os.pread(file.fileno(), end - start, start)
            if time.time() - stat.st_mtime > _TOUCH_SECONDS:
                os.utime(path)
        except OSError:  # never stored, or evicted meanwhile
            return None
        return data if len(data) == end - start else None

    def put(self, key: str, data: bytes) -> bool:
        """Store a chunk, evicting others if necessary.

        Returns:
            False if the disk is full or failing; the run continues without the cached chunk.
        """
        path = self._get_path(key)
        try:
            with self._hold_lock():
                if not path.exists():
                    self._write(path, data)
        except OSError:
            with contextlib.suppress(OSError):
                get_staged_path(path).unlink(missing_ok=True)
            return False
        return True

    def remove(self, key: str) -> None:
        """Remove a chunk that proved to be wrong."""
        with contextlib.suppress(OSError), self._hold_lock():
            self._get_path(key).unlink(missing_ok=True)
            self._used.unlink(missing_ok=True)

    def count_bytes(self) -> int:
        """Return the size of all chunks on the disk; no other process writes meanwhile."""
        with self._hold_lock():
            return sum(size for _, size, path in self._list_files() if path.suffix != STAGED)

    def _write(self, path: Path, data: bytes) -> None:
        # Not `write_atomic`: a cache need not survive a power failure, and syncing every chunk to
        # the disk would make reading wait.
        used = self._read_used()
        if used is None or used + len(data) > self._limit:
            used = self._evict(len(data))
        self._used.write_text("")  # unknown until rewritten: after a kill the next writer recounts
        path.parent.mkdir(exist_ok=True)
        staged = get_staged_path(path)
        staged.write_bytes(data)
        staged.replace(path)
        self._used.write_text(str(used + len(data)))

    def _get_path(self, key: str) -> Path:
        return self._chunks / key[:2] / key

    def _read_used(self) -> int | None:
        try:
            return int(self._used.read_text())
        except (OSError, ValueError):
            return None

    def _evict(self, room: int) -> int:
        """Make `room` bytes of space, and return the bytes in use.

        If anything must go, the oldest chunks go until a tenth of the limit is free as well.
        """
        entries = []
        for entry in sorted(self._list_files()):
            if entry[2].suffix == STAGED:  # left by a killed process: the lock excludes others
                entry[2].unlink(missing_ok=True)
            else:
                entries.append(entry)
        used = sum(size for _, size, _ in entries)
        if used + room <= self._limit:
            return used
        for _, size, path in entries:
            if used + room <= self._limit * 9 // 10:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _list_files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield (time of use, bytes, path) of every file."""
        for folder in os.scandir(self._chunks):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    yield stat.st_mtime, stat.st_size, Path(entry.path)

    @contextlib.contextmanager
    def _hold_lock(self) -> Iterator[None]:
        descriptor = os.open(self._lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
