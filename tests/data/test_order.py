"""The order of a dataset: a permutation per epoch, seeded, local, found from the position alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onellm_dist.data.order import BLOCK_SHARDS, Order, derive_key, permute

COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=60).filter(sum)
PINNED = [[0, 0, 0, 0, 1, 71428571428], [3, 0, 2, 1, 1, 3], [1, 0, 1, 0, 2, 3]]
"""Epochs, shards and rows that `test_an_order_never_changes` expects."""
KEYS = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 3000), key=KEYS)
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    index = np.arange(size)
    out = permute(index, np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(out.tolist()) == index.tolist()


@given(counts=COUNTS, key=KEYS, epochs=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_sample_once(counts: list[int], key: int, epochs: int) -> None:
    order = Order(counts, key)
    places = order.locate(np.arange(order.size * epochs))
    found = sorted(zip(*(column.tolist() for column in places), strict=True))
    assert found == [
        (e, s, r) for e in range(epochs) for s, count in enumerate(counts) for r in range(count)
    ]
    assert (np.diff(places.epoch) >= 0).all()


@given(counts=COUNTS, key=KEYS, positions=st.lists(st.integers(0, 500), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
@pytest.mark.seconds
def test_a_position_does_not_depend_on_what_is_asked_with_it(
    counts: list[int], key: int, positions: list[int]
) -> None:
    whole = Order(counts, key).locate(np.arange(501))
    some = Order(counts, key).locate(np.asarray(positions))
    for of_whole, of_some in zip(whole, some, strict=True):
        assert of_some.tolist() == of_whole[positions].tolist()


def test_epochs_and_keys_differ() -> None:
    order, other = Order([50] * 40, derive_key(0, "a")), Order([50] * 40, derive_key(1, "a"))
    first, second = order.locate(np.arange(2000)), order.locate(np.arange(2000, 4000))
    elsewhere = other.locate(np.arange(2000))
    for a, b in ((first, second), (first, elsewhere)):
        same = (a.shard == b.shard) & (a.row == b.row)
        assert same.mean() < 0.02  # chance: 1 in 2000


def test_neighbours_come_from_one_block_of_shards() -> None:
    places = Order([10] * 100, 7).locate(np.arange(1000))
    for start in range(0, 1000, 10 * BLOCK_SHARDS):
        assert len(set(places.shard[start : start + 10 * BLOCK_SHARDS].tolist())) <= BLOCK_SHARDS


def test_rows_spread_evenly_over_a_block() -> None:
    """Where row 0 of a shard lands, over 400 keys, in quarters of the epoch.

    The 0.1% point of chi-square with 3 degrees of freedom is 16.3.
    """
    quarters = np.zeros(4)
    for key in range(400):
        places = Order([25] * 4, derive_key("spread", key)).locate(np.arange(100))
        quarters[int(np.flatnonzero((places.shard == 0) & (places.row == 0))[0]) // 25] += 1
    assert ((quarters - 100) ** 2 / 100).sum() < 16.3


def test_neighbouring_pairs_are_not_kept() -> None:
    """Neighbours on disk are neighbours in the stream no more often than by chance (1 in 1000)."""
    kept = [
        (
            np.diff(
                permute(np.arange(1000), np.full(1000, 1000), np.full(1000, k, dtype=np.uint64))
            )
            == 1
        ).sum()
        for k in range(200)
    ]
    assert np.mean(kept) < 1.5


def test_an_order_never_changes() -> None:
    """Runs are resumed by other versions of this program and of numpy: numbers must not change."""
    places = Order([3, 5, 2, 4], derive_key("order", 0, "image")).locate(
        np.asarray([0, 1, 2, 13, 14, 10**12])
    )
    assert [column.tolist() for column in places] == PINNED


def test_far_positions_cost_no_memory() -> None:
    order = Order([9662] * 41_400, 3)
    places = order.locate(np.asarray([10**15, 10**15 + 1]))
    assert places.epoch.tolist() == [10**15 // order.size] * 2
    assert (places.row < 9662).all()


def test_nothing_to_order_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Order([0, 0], 1)
