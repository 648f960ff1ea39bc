"""Keys that several shards of a dataset have, found in bounded memory: hashes are dealt into buckets on disk, sorted one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onellm_dist.shards.build.duplicates import ENTRY, sort_entries
from onellm_dist.shards.build.task import hash_key

CAPACITY = 1 << 22
"""Entries sorted at once: 100 MB, and about twice that while they are sorted."""
_MOST_FILES = 512


class StoragePath(NamedTuple):
    """A sample."""

    shard: int
    row: int


def hash_keys(keys: Sequence[str]) -> NDArray[np.uint64]:
    """[n, 2]: 128 bits of each key."""
    return np.frombuffer(b"".join(map(hash_key, keys)), "<u8").reshape(-1, 2)


class RepeatedKeyFinder:
    """Takes the keys of every shard, then tells which repeat an earlier one. To be used as a context: it may hold files.

    Memory: `capacity` entries at a time (up to 512 x `capacity` samples), however many there are. Disk, beyond `capacity`
    samples: 24 bytes a sample in the folder for temporary files (4*10^8 samples: 9.6 GB).

    Args:
        expected: samples, about.
        folder: for temporary files; the system's (TMPDIR) where not given.
        capacity: entries held at once.
    """

    def __init__(self, expected: int, folder: Path | None = None, capacity: int = CAPACITY) -> None:
        self._stack = ExitStack()
        self._held: list[NDArray[np.void]] = []
        self._files: list[IO[bytes]] = []
        count = min(_MOST_FILES, -(-expected // capacity))
        if count > 1:
            scratch = Path(
                self._stack.enter_context(tempfile.TemporaryDirectory(prefix="onellm-", dir=folder))
            )
            self._files = [
                self._stack.enter_context((scratch / str(i)).open("w+b")) for i in range(count)
            ]

    def __enter__(self) -> RepeatedKeyFinder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add(
        self, shard: int, hashes: NDArray[np.uint64], rows: Sequence[int] | None = None
    ) -> None:
        """The keys of a shard: [n, 2], as `hashes_of` makes them; of all its rows in their order, or of some `rows`."""
        entries = np.empty(len(hashes), ENTRY)
        entries["a"], entries["b"] = hashes[:, 0], hashes[:, 1]
        entries["place"] = np.uint64(shard << 32) + (
            np.arange(len(hashes)) if rows is None else np.array(rows, np.int64)
        ).astype(np.uint64)
        if not self._files:
            self._held.append(entries)
            return
        bucket = entries["a"] % np.uint64(len(self._files))
        for number in np.unique(bucket).tolist():
            self._files[number].write(entries[bucket == number].tobytes())

    def repeats(self) -> list[tuple[StoragePath, StoragePath]]:
        """(the first sample with a key, a later one with the same), by the later one's place."""
        found = [pair for bucket in self._buckets() for pair in _repeats(sort_entries(bucket))]
        return sorted(found, key=lambda pair: pair[1])

    def _buckets(self) -> Iterator[NDArray[np.void]]:
        if not self._files:
            yield np.concatenate([np.empty(0, ENTRY), *self._held])
        for file in self._files:
            file.seek(0)
            yield np.fromfile(file, ENTRY)


def _repeats(entries: NDArray[np.void]) -> Iterator[tuple[StoragePath, StoragePath]]:
    same = np.zeros(len(entries), bool)
    same[1:] = (entries["a"][1:] == entries["a"][:-1]) & (entries["b"][1:] == entries["b"][:-1])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(entries))))
    for earlier, later in zip(entries["place"][first[same]], entries["place"][same], strict=True):
        yield _place(earlier), _place(later)


def _place(value: np.uint64) -> StoragePath:
    return StoragePath(int(value) >> 32, int(value) & 0xFFFFFFFF)
