"""Find the keys that several shards of a dataset have, in bounded memory.

The keys' hashes are distributed over buckets on disk, which are sorted one at a time.
"""

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


class SampleRow(NamedTuple):
    """Where a sample stands in a dataset."""

    shard: int
    """Position of its shard in the manifest."""
    row: int
    """Row of the sample in the index of the shard."""


def hash_keys(keys: Sequence[str]) -> NDArray[np.uint64]:
    """Hash keys to 128 bits each, [n, 2]."""
    return np.frombuffer(b"".join(map(hash_key, keys)), "<u8").reshape(-1, 2)


class RepeatedKeyFinder:
    """Takes the keys of every shard, then finds those that repeat an earlier one.

    It is a context manager, because it may hold files. Memory: `capacity` entries at a time (up to
    512 x `capacity` samples), however many there are. Disk, beyond `capacity` samples: 24 bytes a
    sample in the folder for temporary files (4*10^8 samples: 9.6 GB).

    Args:
        expected: the approximate number of samples.
        folder: for temporary files; default: the system's (TMPDIR).
        capacity: entries held at once.
    """

    def __init__(self, expected: int, folder: Path | None = None, capacity: int = CAPACITY) -> None:
        self._stack = ExitStack()
        self._held: list[NDArray[np.void]] = []
        self._files: list[IO[bytes]] = []
        count = min(_MOST_FILES, -(-expected // capacity))
        if count > 1:
            temporary = tempfile.TemporaryDirectory(prefix="onellm-", dir=folder)
            scratch = Path(self._stack.enter_context(temporary))
            self._files = [
                self._stack.enter_context((scratch / str(i)).open("w+b")) for i in range(count)
            ]

    def __enter__(self) -> RepeatedKeyFinder:
        """Return the finder."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close and remove the temporary files."""
        self._stack.close()

    def add(
        self, shard: int, hashes: NDArray[np.uint64], rows: Sequence[int] | None = None
    ) -> None:
        """Add the keys of a shard.

        Args:
            shard: position of the shard in the manifest.
            hashes: [n, 2], as `hash_keys` makes them.
            rows: the rows that they belong to; None: all rows, in order.
        """
        numbers = np.arange(len(hashes)) if rows is None else np.array(rows, np.int64)
        entries = np.empty(len(hashes), ENTRY)
        entries["a"], entries["b"] = hashes[:, 0], hashes[:, 1]
        entries["place"] = np.uint64(shard << 32) + numbers.astype(np.uint64)
        if not self._files:
            self._held.append(entries)
            return
        bucket = entries["a"] % np.uint64(len(self._files))
        for number in np.unique(bucket).tolist():
            self._files[number].write(entries[bucket == number].tobytes())

    def find_repeats(self) -> list[tuple[SampleRow, SampleRow]]:
        """Return (the first sample with a key, a later one with it), ordered by the later."""
        found = [p for bucket in self._read_buckets() for p in _find_pairs(sort_entries(bucket))]
        return sorted(found, key=lambda pair: pair[1])

    def _read_buckets(self) -> Iterator[NDArray[np.void]]:
        if not self._files:
            yield np.concatenate([np.empty(0, ENTRY), *self._held])
        for file in self._files:
            file.seek(0)
            yield np.fromfile(file, ENTRY)


def _find_pairs(entries: NDArray[np.void]) -> Iterator[tuple[SampleRow, SampleRow]]:
    same = np.zeros(len(entries), bool)
    same[1:] = (entries["a"][1:] == entries["a"][:-1]) & (entries["b"][1:] == entries["b"][:-1])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(entries))))
    for earlier, later in zip(entries["place"][first[same]], entries["place"][same], strict=True):
        yield _to_row(earlier), _to_row(later)


def _to_row(place: np.uint64) -> SampleRow:
    return SampleRow(int(place) >> 32, int(place) & 0xFFFFFFFF)
