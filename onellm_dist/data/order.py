"""The order of one dataset: position -> (epoch, shard, row), as a pure function with O(1) memory in the number of samples.

An epoch goes through every sample once. Its shards are permuted, cut into blocks of `BLOCK_SHARDS`, and the rows of each
block are permuted together: neighbours in the stream come from few tars (cheap to read), and no order is kept on disk or
in memory. Permutations of rows are computed and not stored (a Feistel network over a x b >= n cells, walked until it falls
below n), so a position is found as fast at 4e8 samples as at 10.

Nothing here uses numpy's random generators: their streams may change between numpy versions, and an order must not.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

BLOCK_SHARDS = 16
"""Shards whose rows are shuffled together."""
ROUNDS = 8
"""Feistel rounds: 4 suffice for a pseudo-random permutation of large domains (Luby, Rackoff 1988); small ones mix slower."""
KEPT_EPOCHS = 8

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive_key(*labels: object) -> int:
    """A 64-bit key from labels (seed, dataset name, purpose ...): the first 8 bytes of their SHA-256."""
    text = "\x1f".join(str(label) for label in labels)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


def mix(words: Words) -> Words:
    """SplitMix64's finaliser: a bijection of 64-bit words that scatters neighbours (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def hash_words(words: Ints | Words, key: int | Words) -> Words:
    """Pseudo-random 64-bit words of (key, word)."""
    with np.errstate(over="ignore"):
        return mix(
            (words.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.asarray(key, dtype=np.uint64)
        )


def permute(index: Ints, size: Ints, key: Words) -> Ints:
    """Element i of the permutation of range(size[i]) named by key[i], at index[i]; all are [n], 0 <= index < size."""
    rows = np.ceil(np.sqrt(size.astype(np.float64))).astype(
        np.int64
    )  # rows * columns >= size, and hardly more
    columns = -(-size // rows)
    out = index.copy()
    walking = np.arange(len(index))
    while walking.size:
        stepped = _feistel(out[walking], rows[walking], columns[walking], key[walking])
        out[walking] = stepped
        walking = walking[stepped >= size[walking]]
    return out


def _feistel(cell: Ints, rows: Ints, columns: Ints, key: Words) -> Ints:
    """A bijection of range(rows * columns): row and column shift each other in turn."""
    row, column = cell // columns, cell % columns
    for number in range(ROUNDS):
        with np.errstate(over="ignore"):
            round_key = key + np.uint64(number) * np.uint64(0xD1B54A32D192ED03)
        if number % 2 == 0:
            row = (row + _below(hash_words(column, round_key), rows)) % rows
        else:
            column = (column + _below(hash_words(row, round_key), columns)) % columns
    return row * columns + column


def unpermute(value: Ints, size: Ints, key: Words) -> Ints:
    """The inverse of `permute`: where element value[i] stands in the permutation of range(size[i]) named by key[i]."""
    rows = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.int64)
    columns = -(-size // rows)
    out = value.copy()
    walking = np.arange(len(value))
    while walking.size:
        stepped = _feistel_back(out[walking], rows[walking], columns[walking], key[walking])
        out[walking] = stepped
        walking = walking[stepped >= size[walking]]
    return out


def _feistel_back(cell: Ints, rows: Ints, columns: Ints, key: Words) -> Ints:
    """The inverse of `_feistel`."""
    row, column = cell // columns, cell % columns
    for number in reversed(range(ROUNDS)):
        with np.errstate(over="ignore"):
            round_key = key + np.uint64(number) * np.uint64(0xD1B54A32D192ED03)
        if number % 2 == 0:
            row = (row - _below(hash_words(column, round_key), rows)) % rows
        else:
            column = (column - _below(hash_words(row, round_key), columns)) % columns
    return row * columns + column


def _below(words: Words, limit: Ints) -> Ints:
    return ((words >> np.uint64(1)) % limit.astype(np.uint64)).astype(np.int64)


class Places(NamedTuple):
    """Where samples lie; three arrays [n] int64."""

    epoch: Ints
    shard: Ints
    row: Ints


class _Epoch(NamedTuple):
    shards: Ints
    """[S] the shards in this epoch's order."""
    starts: Ints
    """[S + 1] position of each one's first row within the epoch."""
    block_starts: Ints
    """[blocks + 1]"""
    block_keys: Words


class Order:
    """The endless order of one dataset.

    Args:
        counts: samples of each shard, in the manifest's order; at least one sample in all.
        key: names the order (`derive_key(seed, dataset name)`).
    """

    def __init__(self, counts: Sequence[int], key: int) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        self.size = int(self._counts.sum())
        """Samples of an epoch."""
        if self.size <= 0:
            raise ValueError("an order needs at least one sample")
        self._key = key
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, positions: Ints) -> Places:
        """The samples at these positions ([n] int64, >= 0, any order)."""
        epochs, offsets = positions // self.size, positions % self.size
        shard, row = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            shard[here], row[here] = self._locate_in(self._epoch(int(epoch)), offsets[here])
        return Places(epochs, shard, row)

    def positions(self, shard: int, row: int, epochs: Ints) -> Ints:
        """[n] positions of one sample, one in each of these epochs ([n] int64): the inverse of `locate`."""
        start, size, offset = (np.empty_like(epochs) for _ in range(3))
        key = np.empty(len(epochs), dtype=np.uint64)
        for i, number in enumerate(epochs.tolist()):
            epoch = self._epoch(number)
            slot = int(np.flatnonzero(epoch.shards == shard)[0])
            block = slot // BLOCK_SHARDS
            start[i], key[i] = epoch.block_starts[block], epoch.block_keys[block]
            size[i] = epoch.block_starts[block + 1] - start[i]
            offset[i] = epoch.starts[slot] + row - start[i]
        return epochs * self.size + start + unpermute(offset, size, key)

    def _locate_in(self, epoch: _Epoch, offsets: Ints) -> tuple[Ints, Ints]:
        block = np.searchsorted(epoch.block_starts, offsets, side="right") - 1
        start = epoch.block_starts[block]
        size = epoch.block_starts[block + 1] - start
        shuffled = start + permute(offsets - start, size, epoch.block_keys[block])
        slot = np.searchsorted(epoch.starts, shuffled, side="right") - 1
        return epoch.shards[slot], shuffled - epoch.starts[slot]

    def _epoch(self, epoch: int) -> _Epoch:
        known = self._epochs.get(epoch)
        if known is not None:
            self._epochs.move_to_end(epoch)
            return known
        epoch_key = int(hash_words(np.asarray([epoch]), self._key)[0])
        shards = np.argsort(hash_words(np.arange(len(self._counts)), epoch_key), kind="stable")
        starts = np.concatenate([[0], np.cumsum(self._counts[shards])])
        block_starts = np.append(starts[:-1:BLOCK_SHARDS], self.size)
        keys = hash_words(np.arange(len(block_starts) - 1), epoch_key ^ 0x5B)
        made = self._epochs[epoch] = _Epoch(shards, starts, block_starts, keys)
        while len(self._epochs) > KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return made
