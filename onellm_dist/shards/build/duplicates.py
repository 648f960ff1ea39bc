"""Which samples of a finished build repeat an earlier one.

They have the same key, the same media, or nearly the same picture. The first one in plan order
stays, and no sample is dropped because it equals one that was dropped for another reason. Memory is
bounded: hashes are distributed over buckets on disk, and each bucket is searched as a whole.
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
"""A 128-bit hash and the sample it belongs to: `task << 32 | row`, which sorts in plan order."""
BUCKET = 1 << 23
"""Entries that are sorted at once: 200 MB."""
_MOST_FILES = 256
_BLOCKS = (11, 11, 11, 11, 10, 10)
"""Bits of the blocks that a dHash is cut into."""
_SET_BITS = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)
"""The number of set bits of every 16-bit number."""
_PAIRS = 2048
"""Pictures compared with each other at once."""
Rows = Callable[[], Iterator[tuple[int, NDArray[np.void]]]]
"""Yields (task, [samples] of dtype ROW) of each task, in plan order; it is called several times."""
_Hashes = Callable[[NDArray[np.void]], NDArray[np.uint64]]
"""Takes the [n] rows of a task and returns [n, 2] hashes."""
_Dropped = dict[int, NDArray[np.uint64]]
"""Task to the rows that an earlier pass dropped."""


def find_duplicates(
    rows: Rows, *, keys: bool, dedup: str, distance: int, scratch: Path, capacity: int = BUCKET
) -> dict[int, dict[int, str]]:
    """Find the samples that repeat an earlier one.

    Args:
        rows: the samples.
        keys: look for repeated keys.
        dedup: `none`, `exact` (equal media), or `perceptual` (equal media, and dHashes that differ
            in at most `distance` bits).
        distance: see `dedup`.
        scratch: a local folder for the buckets.
        capacity: entries held in memory at once.

    Returns:
        Task to row to what it repeats: `key`, `exact` or `perceptual`.
    """
    found: dict[int, dict[int, str]] = defaultdict(dict)

    def note(places: Iterable[int], why: str) -> None:
        for place in places:
            found[place >> 32].setdefault(place & 0xFFFFFFFF, why)

    total = sum(len(r) for _, r in rows())
    dropped: _Dropped = {}
    if keys:
        for bucket in _make_buckets(rows, lambda r: r["key"], total, scratch, capacity, dropped):
            note(_find_repeats(bucket), "key")
    if dedup != "none":
        dropped = _get_rows(found)
        for bucket in _make_buckets(
            rows, lambda r: r["content"], total, scratch, capacity, dropped
        ):
            note(_find_repeats(bucket), "exact")
    if dedup == "perceptual":
        dropped = _get_rows(found)
        for mask in _make_masks(distance):
            masked = partial(_mask_pictures, mask=mask)
            for bucket in _make_buckets(rows, masked, total, scratch, capacity, dropped):
                note(_find_near(bucket, distance), "perceptual")
    return dict(found)


def _get_rows(found: dict[int, dict[int, str]]) -> _Dropped:
    return {task: np.array(sorted(rows), np.uint64) for task, rows in found.items()}


def _mask_pictures(rows: NDArray[np.void], mask: int) -> NDArray[np.uint64]:
    """Return [n, 2]: the masked dHash, which near pictures share, and the whole one."""
    return np.stack([rows["picture"] & np.uint64(mask), rows["picture"]], axis=1)


def _make_masks(distance: int) -> Iterator[int]:
    """Yield 64-bit masks such that two hashes within `distance` bits agree under at least one.

    Cut into 6 blocks, they agree in 6 - distance of them (Manku et al., WWW 2007, section 3).
    """
    starts = [0, *itertools.accumulate(_BLOCKS)]
    for kept in itertools.combinations(range(len(_BLOCKS)), len(_BLOCKS) - distance):
        yield sum(((1 << _BLOCKS[i]) - 1) << starts[i] for i in kept)


def _make_entries(rows: Rows, get_hashes: _Hashes, dropped: _Dropped) -> Iterator[NDArray[np.void]]:
    for task, samples in rows():
        hashes = get_hashes(samples)
        entries = np.empty(len(samples), ENTRY)
        entries["a"], entries["b"] = hashes[:, 0], hashes[:, 1]
        entries["place"] = np.uint64(task << 32) + np.arange(len(samples), dtype=np.uint64)
        if task in dropped:
            entries = np.delete(entries, dropped[task].astype(np.int64))
        yield entries


def _make_buckets(
    rows: Rows,
    get_hashes: _Hashes,
    total: int,
    scratch: Path,
    capacity: int,
    dropped: _Dropped,
) -> Iterator[NDArray[np.void]]:
    """Yield all entries that were not dropped, those of equal `a` in the same bucket, sorted."""
    count = min(_MOST_FILES, -(-total // capacity))
    if count <= 1:
        made = _make_entries(rows, get_hashes, dropped)
        yield sort_entries(np.concatenate([np.empty(0, ENTRY), *made]))
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        names = [Path(folder, str(i)) for i in range(count)]
        with ExitStack() as stack:
            files = [stack.enter_context(name.open("wb")) for name in names]
            for entries in _make_entries(rows, get_hashes, dropped):
                # Masked hashes have few distinct low bits, so they are mixed first (the multiplier
                # is splitmix64's).
                mixed = (entries["a"] * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(32)
                number = mixed % np.uint64(count)
                for i in np.unique(number).tolist():
                    files[i].write(entries[number == i].tobytes())
        for name in names:
            yield sort_entries(np.fromfile(name, ENTRY))


def sort_entries(entries: NDArray[np.void]) -> NDArray[np.void]:
    """Sort [n] of dtype ENTRY by hash, then by place."""
    return entries[np.lexsort((entries["place"], entries["b"], entries["a"]))]


def _equal_previous(entries: NDArray[np.void]) -> NDArray[np.bool_]:
    """Return [n - 1]: whether each entry but the first has the hash of the one before it."""
    equal: NDArray[np.bool_] = (entries["a"][1:] == entries["a"][:-1]) & (
        entries["b"][1:] == entries["b"][:-1]
    )
    return equal


def _find_repeats(entries: NDArray[np.void]) -> list[int]:
    """Return the places of the entries that equal the one before them."""
    places: list[int] = entries["place"][1:][_equal_previous(entries)].tolist()
    return places


def _find_near(entries: NDArray[np.void], distance: int) -> Iterator[int]:
    """Yield the places of pictures that are near an earlier one that agrees under the mask."""
    yield from _find_repeats(entries)
    if not distance:
        return
    first = np.ones(len(entries), bool)
    first[1:] = ~_equal_previous(entries)
    unique = entries[first]
    edges = np.flatnonzero(np.diff(unique["a"], prepend=~unique["a"][:1], append=~unique["a"][-1:]))
    several = np.diff(edges) > 1
    for start, stop in zip(edges[:-1][several].tolist(), edges[1:][several].tolist(), strict=True):
        alike = unique[start:stop][np.argsort(unique["place"][start:stop])]
        for begin in range(0, len(alike), _PAIRS):
            later = alike[begin : begin + _PAIRS]
            near = np.zeros(len(later), bool)
            for other in range(0, begin + len(later), _PAIRS):
                earlier = alike[other : other + _PAIRS]
                bits = _count_bits(later["b"][:, None] ^ earlier["b"][None, :])
                before = earlier["place"][None, :] < later["place"][:, None]
                near |= ((bits <= distance) & before).any(axis=1)
            yield from later["place"][near].tolist()


def _count_bits(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Count the set bits of each word."""
    halves = words.view(np.uint16).reshape(*words.shape, 4)
    counts: NDArray[np.uint8] = _SET_BITS[halves].sum(axis=-1, dtype=np.uint8)
    return counts
