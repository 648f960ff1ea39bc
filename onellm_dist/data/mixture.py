"""The mixture: from a position in the stream to (dataset, position within it), without randomness.

Weights become fractions n_j / D with a common denominator. A period of D positions, in which
dataset j occurs n_j times, is computed once and repeated forever, so any position is found without
replaying the stream. Within the period, Tijdeman's rule (The chairman assignment problem, 1980)
keeps the count of every prefix within 1 - 1/(2m - 2) < 1 samples of weight x length for m
datasets. (Choosing the largest deficit greedily is off by up to 1.29 with 8 weights.)

Integer weights are exact whatever their sum. Where the period is too long to lay out (sizes of
datasets), positions are found by arithmetic (split_tree.py), within 2 samples of weight x length.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from onellm_dist.data.split_tree import SplitTree

EXACT_PERIOD = 1 << 20
"""The longest period that is laid out. Decimal weights whose reduced integers add up to at most
this are used exactly, as they are written."""
COARSE_PERIOD = 1 << 16
"""Other decimal weights are rounded to this denominator, but never below 1."""

Ints = NDArray[np.int64]


class Mixture:
    """An endless interleaving of m datasets by weight.

    Args:
        weights: positive weights, relative to each other; at least one.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._fill(quantise_weights(weights))

    @classmethod
    def from_counts(cls, counts: Sequence[int]) -> Mixture:
        """Build the mixture with these counts per period (the attribute `counts`)."""
        mixture = cls.__new__(cls)
        mixture._fill(list(counts))
        return mixture

    def _fill(self, counts: list[int]) -> None:
        self.counts = counts
        """How often each dataset occurs in a period."""
        self.period = sum(self.counts)
        """D, the common denominator: dataset j is exactly counts[j] / D of the stream."""
        laid_out = len(counts) == 1 or self.period <= EXACT_PERIOD
        self._layout = _LaidOutPeriod(self.counts) if laid_out else SplitTree(self.counts)

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """Find the samples at positions of the stream.

        Args:
            positions: [n] positions of the stream.

        Returns:
            [n] datasets, and [n] positions within each dataset's own order.
        """
        period, offset = positions // self.period, positions % self.period
        dataset, earlier = self._layout.locate(offset)
        counts = np.asarray(self.counts, dtype=np.int64)
        return dataset, period * counts[dataset] + earlier

    def find_positions(self, dataset: int, index: Ints) -> Ints:
        """Find where samples of a dataset occur in the stream: the inverse of `locate`.

        Args:
            dataset: index of the dataset.
            index: [n] positions within the dataset's own order.

        Returns:
            [n] positions of the stream.
        """
        period, nth = index // self.counts[dataset], index % self.counts[dataset]
        return period * self.period + self._layout.find(dataset, nth)

    def count_taken(self, length: int) -> list[int]:
        """Return how often each dataset occurs in the first `length` positions."""
        periods, rest = divmod(length, self.period)
        partial = self._layout.count(rest)
        return [periods * count + more for count, more in zip(self.counts, partial, strict=True)]


class _LaidOutPeriod:
    """One period as an array, by Tijdeman's rule; the methods are those of SplitTree."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._datasets = len(counts)
        self._sequence = np.asarray(build_sequence(counts), dtype=np.int64)
        # earlier occurrences of the same dataset in the period
        self._earlier = np.empty(len(self._sequence), dtype=np.int64)
        for dataset, count in enumerate(counts):
            self._earlier[self._sequence == dataset] = np.arange(count)

    def locate(self, offsets: Ints) -> tuple[Ints, Ints]:
        return self._sequence[offsets], self._earlier[offsets]

    def find(self, dataset: int, nth: Ints) -> Ints:
        found: Ints = np.flatnonzero(self._sequence == dataset)[nth]
        return found

    def count(self, length: int) -> list[int]:
        counts: list[int] = np.bincount(self._sequence[:length], minlength=self._datasets).tolist()
        return counts


def quantise_weights(weights: Sequence[float]) -> list[int]:
    """Return integers in the ratio of the weights.

    They are exact if all weights are integers, or if their reduced integers add up to at most
    EXACT_PERIOD. Others are rounded, see `round_weights`.

    Raises:
        ValueError: there is no weight, or one is not positive.
    """
    counts, integers = _reduce_weights(weights)
    return counts if integers else round_weights(weights)


def round_weights(weights: Sequence[float]) -> list[int]:
    """Return integers in nearly the ratio of the weights, with a sum of at most EXACT_PERIOD.

    If the exact integers exceed it, they are rounded to COARSE_PERIOD by largest remainder, and
    every weight keeps at least 1, so that no dataset is lost. Runs that began when integers were
    rounded too keep these counts (`Plan.follow`).

    Raises:
        ValueError: there is no weight, or one is not positive.
    """
    counts, _ = _reduce_weights(weights)
    return counts if sum(counts) <= EXACT_PERIOD else _round_to(counts, COARSE_PERIOD)


def _reduce_weights(weights: Sequence[float]) -> tuple[list[int], bool]:
    """Return coprime integers in the ratio of the weights, and whether all weights are integers."""
    exact = [Fraction(str(weight)) for weight in weights]
    if not exact or any(weight <= 0 for weight in exact):
        raise ValueError("a mixture needs at least one weight, all of them above 0")
    denominator = lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * denominator) for weight in exact]
    common = gcd(*counts)
    return [count // common for count in counts], denominator == 1


def _round_to(counts: list[int], period: int) -> list[int]:
    total = sum(counts)
    rounded = [max(1, count * period // total) for count in counts]
    remainder = [count * period % total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda j: (-remainder[j], j))
    for j in by_remainder[: max(0, period - sum(rounded))]:
        rounded[j] += 1
    while sum(rounded) > period:  # raising weights to 1 exceeded it: take from the largest
        rounded[rounded.index(max(rounded))] -= 1
    return rounded


def build_sequence(counts: Sequence[int]) -> list[int]:
    """Build one period by Tijdeman's rule: counts[j] times j, with every prefix evenly mixed.

    The rule "among the j with w_j k - c_j >= 1/(2m-2), take the one with the smallest
    (c_j + 1 - 1/(2m-2)) / w_j" is earliest deadline first: occurrence c of j may take positions
    from k = ceil((c + e) / w_j) on and must take one by floor((c + 1 - e) / w_j), where
    e = 1/(2m-2). It is therefore computed with a heap, in integers, in O(D log m).
    """
    m, period = len(counts), sum(counts)
    if m == 1:
        return [0] * period
    scale = 2 * m - 2

    def compute_window(j: int, c: int) -> tuple[int, int]:
        """Return the first and the last position of occurrence c of dataset j."""
        scaled = scale * counts[j]
        return -(-(scale * c + 1) * period // scaled), (scale * (c + 1) - 1) * period // scaled

    done = [0] * m
    waiting = [(compute_window(j, 0)[0], j) for j in range(m)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    sequence: list[int] = []
    for k in range(1, period + 1):
        while waiting and waiting[0][0] <= k:
            j = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (compute_window(j, done[j])[1], j))
        j = heapq.heappop(ready)[1]
        sequence.append(j)
        done[j] += 1
        if done[j] < counts[j]:
            heapq.heappush(waiting, (compute_window(j, done[j])[0], j))
    return sequence
