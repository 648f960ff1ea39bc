"""Which samples of a finished build repeat an earlier one: the same key, the same media, or nearly the same picture.

The first in plan order stays; nothing goes because it equals a sample that went for another reason. Memory is bounded: hashes
are dealt into buckets on disk, and a bucket is looked at as a whole.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ENTRY = np.dtype([("a", "<u8"), ("b", "<u8"), ("place", "<u8")])
"""A 128-bit hash and the sample it belongs to: `unit << 32 | row`, which sorts in plan order."""
BUCKET = 1 << 23
"""Entries that are sorted at once: 200 MB."""
_MOST_FILES = 256
_BLOCKS = (11, 11, 11, 11, 10, 10)
_SET_BITS = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)
"""Of every 16-bit number."""
_PAIRS = 2048
"""Pictures compared with each other at once."""
Rows = Callable[[], Iterator[tuple[int, NDArray[np.void]]]]
"""(unit, [samples] of dtype ROW) of every unit, in plan order; may be gone through several times."""


def find_duplicates(
    rows: Rows, *, keys: bool, dedup: str, distance: int, scratch: Path, capacity: int = BUCKET
) -> dict[int, dict[int, str]]:
    """ShardTask -> row -> why it repeats an earlier sample: `key`, `exact` or `perceptual`.

    Args:
        rows: the samples.
        keys: look for repeated keys.
        dedup: `none`, `exact` (equal media), `perceptual` (equal media, and dHashes that differ in at most `distance` bits).
        scratch: a local folder for the buckets.
        capacity: entries held in memory at once.
    """
    found: dict[int, dict[int, str]] = defaultdict(dict)

    def note(places: Iterable[int], why: str) -> None:
        for place in places:
            found[place >> 32].setdefault(place & 0xFFFFFFFF, why)

    total = sum(len(r) for _, r in rows())
    gone: dict[int, NDArray[np.uint64]] = {}
    """ShardTask -> rows that an earlier pass dropped: nothing may go because it equals one of them."""
    if keys:
        for bucket in _buckets(rows, lambda r: r["key"], total, scratch, capacity, gone):
            note(_repeats(bucket), "key")
    if dedup != "none":
        gone = _rows_of(found)
        for bucket in _buckets(rows, lambda r: r["content"], total, scratch, capacity, gone):
            note(_repeats(bucket), "exact")
    if dedup == "perceptual":
        gone = _rows_of(found)
        for mask in _masks(distance):
            for bucket in _buckets(
                rows, partial(_looks, mask=mask), total, scratch, capacity, gone
            ):
                note(_near(bucket, distance), "perceptual")
    return dict(found)


def _rows_of(found: dict[int, dict[int, str]]) -> dict[int, NDArray[np.uint64]]:
    return {unit: np.array(sorted(rows), np.uint64) for unit, rows in found.items()}


def _looks(rows: NDArray[np.void], mask: int) -> NDArray[np.uint64]:
    """[n, 2] the masked dHash, which near ones share, and the whole one."""
    return np.stack([rows["look"] & np.uint64(mask), rows["look"]], axis=1)


def _masks(distance: int) -> Iterator[int]:
    """64-bit masks such that two hashes within `distance` bits agree under at least one: cut into 6 blocks, they agree in
    6 - distance of them (Manku et al., WWW 2007, section 3).
    """
    starts = [0, *itertools.accumulate(_BLOCKS)]
    for kept in itertools.combinations(range(len(_BLOCKS)), len(_BLOCKS) - distance):
        yield sum(((1 << _BLOCKS[i]) - 1) << starts[i] for i in kept)


def _entries(
    rows: Rows,
    of: Callable[[NDArray[np.void]], NDArray[np.uint64]],
    gone: dict[int, NDArray[np.uint64]],
) -> Iterator[NDArray[np.void]]:
    for unit, samples in rows():
        hashes = of(samples)
        entries = np.empty(len(samples), ENTRY)
        entries["a"], entries["b"] = hashes[:, 0], hashes[:, 1]
        entries["place"] = np.uint64(unit << 32) + np.arange(len(samples), dtype=np.uint64)
        yield np.delete(entries, gone[unit].astype(np.int64)) if unit in gone else entries


def _buckets(
    rows: Rows,
    of: Callable[[NDArray[np.void]], NDArray[np.uint64]],
    total: int,
    scratch: Path,
    capacity: int,
    gone: dict[int, NDArray[np.uint64]],
) -> Iterator[NDArray[np.void]]:
    """All entries but those of `gone`, those of equal `a` in the same bucket, sorted by (a, b, place)."""
    count = min(_MOST_FILES, -(-total // capacity))
    if count <= 1:
        yield sort_entries(np.concatenate([np.empty(0, ENTRY), *_entries(rows, of, gone)]))
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        names = [Path(folder, str(i)) for i in range(count)]
        with ExitStack() as stack:
            files = [stack.enter_context(name.open("wb")) for name in names]
            for entries in _entries(rows, of, gone):
                # Masked hashes have few distinct low bits, so they are mixed first (the multiplier is splitmix64's).
                number = (
                    (entries["a"] * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(32)
                ) % np.uint64(count)
                for i in np.unique(number).tolist():
                    files[i].write(entries[number == i].tobytes())
        for name in names:
            yield sort_entries(np.fromfile(name, ENTRY))


def sort_entries(entries: NDArray[np.void]) -> NDArray[np.void]:
    """[n] of dtype ENTRY, by hash, then by place."""
    return entries[np.lexsort((entries["place"], entries["b"], entries["a"]))]


def _repeats(entries: NDArray[np.void]) -> list[int]:
    """Places of the entries that equal the one before them."""
    same = (entries["a"][1:] == entries["a"][:-1]) & (entries["b"][1:] == entries["b"][:-1])
    return entries["place"][1:][same].tolist()  # type: ignore[no-any-return]


def _near(entries: NDArray[np.void], distance: int) -> Iterator[int]:
    """Places of pictures that are near an earlier one among those that agree under the mask."""
    yield from _repeats(entries)
    if not distance:
        return
    first = np.ones(len(entries), bool)
    first[1:] = (entries["a"][1:] != entries["a"][:-1]) | (entries["b"][1:] != entries["b"][:-1])
    unique = entries[first]
    edges = np.flatnonzero(np.diff(unique["a"], prepend=~unique["a"][:1], append=~unique["a"][-1:]))
    several = np.diff(edges) > 1
    for start, stop in zip(edges[:-1][several].tolist(), edges[1:][several].tolist(), strict=True):
        run = unique[start:stop][np.argsort(unique["place"][start:stop])]
        for begin in range(0, len(run), _PAIRS):
            later = run[begin : begin + _PAIRS]
            near = np.zeros(len(later), bool)
            for other in range(0, begin + len(later), _PAIRS):
                earlier = run[other : other + _PAIRS]
                close = _bits(later["b"][:, None] ^ earlier["b"][None, :]) <= distance
                near |= (close & (earlier["place"][None, :] < later["place"][:, None])).any(axis=1)
            yield from later["place"][near].tolist()


def _bits(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Set bits of each word."""
    return _SET_BITS[words.view(np.uint16).reshape(*words.shape, 4)].sum(axis=-1, dtype=np.uint8)
