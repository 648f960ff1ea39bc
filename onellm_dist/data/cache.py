"""The node-local cache of remote shards (`data.cache_dir`): chunks of tars, bounded in size, shared by the node's processes.

Whoever wants to write takes the folder's lock, so that the size is counted and never passes the limit; readers take no lock.
A chunk appears whole (renamed into place); one that went bad on the disk is found by the index's CRC-32 of the part that
was wanted, and is fetched again. What was used longest ago is evicted first, a tenth of the limit at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from onellm_dist.common.errors import UsageError

CHUNK = 4 << 20
"""Bytes of a chunk; the last one of a tar is shorter."""
_TOUCH_SECONDS = 60.0
"""A chunk's time of use is noted this often at most."""
_ASIDE = ".aside"


class ChunkCache:
    """Chunks by key, in a folder.

    Args:
        folder: on a disk of this node; made where it is not there.
        limit: most bytes.

    Raises:
        UsageError: the folder cannot be written, or the limit is less than a few chunks.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 4 * CHUNK:
            raise UsageError(
                f"data.cache_gb={limit / 1e9:g} is less than {4 * CHUNK} bytes",
                "it would hold nothing.",
                "give it more.",
            )
        self._chunks, self._lock, self._used = folder / "chunks", folder / "lock", folder / "used"
        self._limit = limit
        try:
            self._chunks.mkdir(parents=True, exist_ok=True)
            self._lock.touch()
        except OSError as error:
            raise UsageError(
                f"data.cache_dir={folder}: {error.strerror or error}",
                "remote shards are to be kept there.",
                "give a folder that this user may write, or take the key out.",
            ) from error

    def get(self, key: str, start: int, end: int) -> bytes | None:
        """Bytes start .. end - 1 of a chunk, or None where the cache does not have them."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                data = os.pread(file.fileno(), end - start, start)
            if time.time() - stat.st_mtime > _TOUCH_SECONDS:
                os.utime(path)
        except OSError:  # not there, or evicted just now
            return None
        return data if len(data) == end - start else None

    def put(self, key: str, data: bytes) -> bool:
        """Keeps a chunk, and evicts others for it. False: the disk is full or failing; the cache goes on without it."""
        path = self._path(key)
        try:
            with self._locked():
                if not path.exists():
                    self._write(path, data)
        except OSError:
            with contextlib.suppress(OSError):
                path.with_name(path.name + _ASIDE).unlink(missing_ok=True)
            return False
        return True

    def _write(self, path: Path, data: bytes) -> None:
        used = self._count()
        if used is None or used + len(data) > self._limit:
            used = self._evict(len(data))
        self._used.write_text(
            ""
        )  # not known until it is written again: after a kill here the next one counts anew
        path.parent.mkdir(exist_ok=True)
        aside = path.with_name(path.name + _ASIDE)
        aside.write_bytes(data)
        aside.replace(path)
        self._used.write_text(str(used + len(data)))

    def forget(self, key: str) -> None:
        """Removes a chunk that proved wrong."""
        with contextlib.suppress(OSError), self._locked():
            self._path(key).unlink(missing_ok=True)
            self._used.unlink(missing_ok=True)

    def bytes_used(self) -> int:
        """Bytes of all chunks, counted on the disk."""
        return sum(size for _, size, path in self._entries() if path.suffix != _ASIDE)

    def _path(self, key: str) -> Path:
        return self._chunks / key[:2] / key

    def _count(self) -> int | None:
        try:
            return int(self._used.read_text())
        except (OSError, ValueError):
            return None

    def _evict(self, room: int) -> int:
        """Makes `room`; the oldest go until a tenth of the limit is free too, where anything must go at all."""
        entries = []
        for entry in sorted(self._entries()):
            if entry[2].suffix == _ASIDE:  # nobody else is writing now: a killed process left it
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

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(time of use, bytes, path) of every file."""
        for folder in os.scandir(self._chunks):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    yield stat.st_mtime, stat.st_size, Path(entry.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
