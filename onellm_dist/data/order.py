"""The order of one dataset: from a position to (epoch, shard, row), as a pure function.

An epoch visits every sample once. Its shards are permuted and divided into blocks of
`BLOCK_SHARDS`, and the rows of each block are permuted together, so neighbours in the stream come
from few tars (cheap to read). Permutations of rows are computed rather than stored: a Feistel
network over a x b >= n cells is applied until the result falls below n. Memory is therefore
independent of the number of samples, and a position is found as fast among 4e8 samples as
among 10.

Nothing here uses numpy's random generators: their streams may change between numpy versions, and
an order must not.
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
"""Feistel rounds. Four suffice for a pseudo-random permutation of large domains (Luby and Rackoff
1988); small domains mix more slowly."""
KEPT_EPOCHS = 8
"""Epochs whose shard order stays in memory."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive_key(*labels: object) -> int:
    """Return a 64-bit key for labels (seed, dataset, purpose): 8 bytes of their SHA-256."""
    text = "\x1f".join(str(label) for label in labels)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


def mix(words: Words) -> Words:
    """Apply SplitMix64's finaliser: a bijection that scatters neighbours (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def hash_words(words: Ints | Words, key: int | Words) -> Words:
    """Return pseudo-random 64-bit words for (key, word) pairs."""
    with np.errstate(over="ignore"):
        return mix(
            (words.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.asarray(key, dtype=np.uint64)
        )


def permute(index: Ints, size: Ints, key: Words) -> Ints:
    """Apply permutations: that of range(size[i]) named by key[i], at index[i].

    All arguments are [n], with 0 <= index < size.
    """
    rows, columns = _compute_grid(size)
    out = index.copy()
    outside = np.arange(len(index))
    while outside.size:
        stepped = _apply_feistel(out[outside], rows[outside], columns[outside], key[outside])
        out[outside] = stepped
        outside = outside[stepped >= size[outside]]
    return out


def unpermute(value: Ints, size: Ints, key: Words) -> Ints:
    """Invert `permute`: find where value[i] stands in the permutation of range(size[i])."""
    rows, columns = _compute_grid(size)
    out = value.copy()
    outside = np.arange(len(value))
    while outside.size:
        stepped = _invert_feistel(out[outside], rows[outside], columns[outside], key[outside])
        out[outside] = stepped
        outside = outside[stepped >= size[outside]]
    return out


def _compute_grid(size: Ints) -> tuple[Ints, Ints]:
    """Return rows and columns of the smallest nearly square grid with at least `size` cells."""
    rows = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.int64)
    return rows, -(-size // rows)


def _apply_feistel(cell: Ints, rows: Ints, columns: Ints, key: Words) -> Ints:
    """Apply a bijection of range(rows * columns): row and column shift each other in turn."""
    row, column = cell // columns, cell % columns
    for number in range(ROUNDS):
        round_key = _compute_round_key(key, number)
        if number % 2 == 0:
            row = (row + _reduce(hash_words(column, round_key), rows)) % rows
        else:
            column = (column + _reduce(hash_words(row, round_key), columns)) % columns
    return row * columns + column


def _invert_feistel(cell: Ints, rows: Ints, columns: Ints, key: Words) -> Ints:
    """Invert `_apply_feistel`."""
    row, column = cell // columns, cell % columns
    for number in reversed(range(ROUNDS)):
        round_key = _compute_round_key(key, number)
        if number % 2 == 0:
            row = (row - _reduce(hash_words(column, round_key), rows)) % rows
        else:
            column = (column - _reduce(hash_words(row, round_key), columns)) % columns
    return row * columns + column


def _compute_round_key(key: Words, number: int) -> Words:
    with np.errstate(over="ignore"):
        return key + np.uint64(number) * np.uint64(0xD1B54A32D192ED03)


def _reduce(words: Words, limit: Ints) -> Ints:
    """Map words to range(limit)."""
    return ((words >> np.uint64(1)) % limit.astype(np.uint64)).astype(np.int64)


class SamplePositions(NamedTuple):
    """Where samples are stored; three arrays [n] int64."""

    epoch: Ints
    shard: Ints
    row: Ints


class _Epoch(NamedTuple):
    """The order of one epoch: S shards in blocks."""

    shards: Ints
    """[S] shards in this epoch's order."""
    starts: Ints
    """[S + 1] position of each shard's first row within the epoch."""
    block_starts: Ints
    """[blocks + 1] position of each block's first row within the epoch."""
    block_keys: Words
    """[blocks] key of each block's permutation."""


class Order:
    """The endless order of one dataset.

    Args:
        counts: number of samples of each shard, in the manifest's order; at least one in all.
        key: names the order (`derive_key("order", seed, dataset name)`).
    """

    def __init__(self, counts: Sequence[int], key: int) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        self.size = int(self._counts.sum())
        """Samples of an epoch."""
        if self.size <= 0:
            raise ValueError("an order needs at least one sample")
        self._key = key
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, positions: Ints) -> SamplePositions:
        """Find the samples at positions of the order ([n] int64, >= 0, in any order)."""
        epochs, offsets = positions // self.size, positions % self.size
        shard, row = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            shard[here], row[here] = self._locate_in(self._get_epoch(int(epoch)), offsets[here])
        return SamplePositions(epochs, shard, row)

    def find_positions(self, shard: int, row: int, epochs: Ints) -> Ints:
        """Find the position of one sample in each of some epochs: the inverse of `locate`.

        Args:
            shard: the sample's shard.
            row: the sample's row.
            epochs: [n] epochs.

        Returns:
            [n] positions, one per epoch.
        """
        start, size, offset = (np.empty_like(epochs) for _ in range(3))
        key = np.empty(len(epochs), dtype=np.uint64)
        for i, number in enumerate(epochs.tolist()):
            epoch = self._get_epoch(number)
            place = int(np.flatnonzero(epoch.shards == shard)[0])
            block = place // BLOCK_SHARDS
            start[i], key[i] = epoch.block_starts[block], epoch.block_keys[block]
            size[i] = epoch.block_starts[block + 1] - start[i]
            offset[i] = epoch.starts[place] + row - start[i]
        return epochs * self.size + start + unpermute(offset, size, key)

    def _locate_in(self, epoch: _Epoch, offsets: Ints) -> tuple[Ints, Ints]:
        """Return shards and rows at offsets within an epoch."""
        block = np.searchsorted(epoch.block_starts, offsets, side="right") - 1
        start = epoch.block_starts[block]
        size = epoch.block_starts[block + 1] - start
        shuffled = start + permute(offsets - start, size, epoch.block_keys[block])
        place = np.searchsorted(epoch.starts, shuffled, side="right") - 1
        return epoch.shards[place], shuffled - epoch.starts[place]

    def _get_epoch(self, number: int) -> _Epoch:
        known = self._epochs.get(number)
        if known is not None:
            self._epochs.move_to_end(number)
            return known
        epoch_key = int(hash_words(np.asarray([number]), self._key)[0])
        shards = np.argsort(hash_words(np.arange(len(self._counts)), epoch_key), kind="stable")
        starts = np.concatenate([[0], np.cumsum(self._counts[shards])])
        block_starts = np.append(starts[:-1:BLOCK_SHARDS], self.size)
        keys = hash_words(np.arange(len(block_starts) - 1), epoch_key ^ 0x5B)
        epoch = self._epochs[number] = _Epoch(shards, starts, block_starts, keys)
        while len(self._epochs) > KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return epoch
