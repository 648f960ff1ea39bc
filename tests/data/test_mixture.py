"""The mixture: Tijdeman's bound over every prefix, exact fractions, positions without replay."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onellm_dist.data.mixture import (
    COARSE_PERIOD,
    Mixture,
    build_sequence,
    quantise_weights,
    round_weights,
)
from onellm_dist.data.split_tree import SplitTree


def worst_deviation(mixture: Mixture, length: int) -> float:
    """Largest |count - weight x length| over datasets and prefixes of the stream."""
    dataset, _ = mixture.locate(np.arange(length))
    lengths = np.arange(1, length + 1)
    return max(
        float(np.abs(np.cumsum(dataset == j) - count * lengths / mixture.period).max())
        for j, count in enumerate(mixture.counts)
    )


@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=16))
@settings(max_examples=80, deadline=None)
@pytest.mark.seconds
def test_every_prefix_is_within_one_sample(counts: list[int]) -> None:
    mixture = Mixture(counts)
    m = len(counts)
    bound = 0.0 if m == 1 else 1 - 1 / (2 * m - 2)
    assert worst_deviation(mixture, 3 * mixture.period) <= bound + 1e-9


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=16))
@settings(max_examples=8, deadline=None)
@pytest.mark.seconds
def test_odd_weights_are_rounded_finely_and_kept_within_one_sample(weights: list[float]) -> None:
    mixture = Mixture(weights)
    assert worst_deviation(mixture, mixture.period) < 1
    if mixture.period == COARSE_PERIOD:
        for count, weight in zip(mixture.counts, weights, strict=True):
            assert (
                abs(count / mixture.period - weight / sum(weights)) <= len(weights) / COARSE_PERIOD
            )


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    at=st.lists(st.integers(0, 400), min_size=1, max_size=10),
)
@settings(max_examples=60, deadline=None)
def test_positions_are_found_without_replay(counts: list[int], at: list[int]) -> None:
    mixture = Mixture(counts)
    dataset, index = mixture.locate(np.arange(401))
    seen = dict.fromkeys(range(len(counts)), 0)
    for j, i in zip(dataset.tolist(), index.tolist(), strict=True):
        assert i == seen[j]  # a dataset's own positions come in order, none left out
        seen[j] += 1
    for some, whole in zip(mixture.locate(np.asarray(at)), (dataset, index), strict=True):
        assert some.tolist() == whole[at].tolist()


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1, 1, 1], [1, 1, 1]),
        ([0.5, 0.25, 0.25], [2, 1, 1]),
        ([0.1, 0.2, 0.7], [1, 2, 7]),
        ([2.5, 1], [5, 2]),
        ([1e6, 1], [10**6, 1]),
    ],
)
def test_decimal_weights_are_exact(weights: list[float], counts: list[int]) -> None:
    assert quantise_weights(weights) == counts


def test_a_tiny_weight_is_not_lost() -> None:
    counts = quantise_weights([1e9, 1.0, 0.3333333333])
    assert sum(counts) == COARSE_PERIOD
    assert counts[1:] == [1, 1]


def test_the_period_has_the_counts() -> None:
    counts = [7, 3, 11, 1]
    sequence = build_sequence(counts)
    assert [sequence.count(j) for j in range(4)] == counts


def test_eight_weights_stay_under_the_bound_that_greedy_breaks() -> None:
    """Largest-deficit-first reaches 1.29 with 8 weights; Tijdeman's bound is 1 - 1/14 = 0.9286."""
    weights = [0.38, 0.2, 0.14, 0.1, 0.08, 0.05, 0.03, 0.02]
    mixture = Mixture(weights)
    assert mixture.period == 100
    assert worst_deviation(mixture, 100_000) <= 13 / 14 + 1e-9
    assert [Fraction(c, 100) for c in mixture.counts] == [Fraction(str(w)) for w in weights]


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        quantise_weights(weights)


@pytest.mark.parametrize(
    ("sizes", "reduced"),
    [
        ([2006123, 461233], [2006123, 461233]),
        ([2006123.0, 461233.0], [2006123, 461233]),
        ([1_000_000_000, 2_500_000, 400_000], [10_000, 25, 4]),
        ([5_850_000_001, 413_871_335, 7], [5_850_000_001, 413_871_335, 7]),
    ],
)
def test_sizes_of_datasets_are_exact_weights(sizes: list[float], reduced: list[int]) -> None:
    mixture = Mixture(sizes)
    assert mixture.counts == reduced
    assert mixture.count_taken(3 * mixture.period) == [3 * count for count in reduced]
    assert mixture.period == sum(reduced)


def test_large_integers_interleave_evenly() -> None:
    mixture = Mixture([2006123, 461233])
    assert worst_deviation(mixture, mixture.period) <= 0.5 + 1e-9


@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=12))
@settings(max_examples=40, deadline=None)
def test_a_computed_period_is_a_mixture(counts: list[int]) -> None:
    """Exact counts, a dataset's own positions in order, `find` and `count` agree with `locate`."""
    tree, period = SplitTree(counts), sum(counts)
    dataset, earlier = tree.locate(np.arange(period))
    assert np.bincount(dataset, minlength=len(counts)).tolist() == counts
    lengths = np.arange(1, period + 1)
    for j, count in enumerate(counts):
        here = np.flatnonzero(dataset == j)
        assert earlier[here].tolist() == list(range(count))
        assert tree.find(j, np.arange(count)).tolist() == here.tolist()
        assert np.abs(np.cumsum(dataset == j) - count * lengths / period).max() < 2
    half = period // 2
    assert tree.count(half) == np.bincount(dataset[:half], minlength=len(counts)).tolist()


def test_positions_far_out_in_a_period_beyond_64_bit_products() -> None:
    mixture = Mixture([5_850_000_001, 413_871_335, 7])
    positions = np.asarray([0, 10**9, 6 * 10**12 + 5])
    dataset, index = mixture.locate(positions)
    for j, i, position in zip(dataset.tolist(), index, positions.tolist(), strict=True):
        assert mixture.find_positions(j, np.asarray([i])).tolist() == [position]
        assert mixture.count_taken(position)[j] == i


def test_integers_were_rounded_before() -> None:
    assert round_weights([2006123, 461233]) == [53285, 12251]
