"""The mixture: position of the stream -> (dataset, position within that dataset), by counters and not by chance.

Weights become fractions n_j / D with one denominator; a period of D positions in which dataset j occurs n_j times is
computed once and repeated for ever, so any position is found without replaying the stream. Within the period Tijdeman's
rule (The chairman assignment problem, 1980) keeps the count of every prefix within 1 - 1/(2m - 2) < 1 samples of weight x
length for m datasets. (Greedy largest-deficit reaches 1.29 with 8 weights.)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

EXACT_PERIOD = 1 << 20
"""Weights whose common denominator is at most this are taken exactly (as the decimal numbers they are written as)."""
COARSE_PERIOD = 1 << 16
"""Other weights are rounded to this denominator; none becomes less than 1."""

Ints = NDArray[np.int64]


class Mixture:
    """An endless interleaving of m datasets by weight.

    Args:
        weights: positive, relative to each other; at least one.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._fill(quantise(weights))

    @classmethod
    def of_counts(cls, counts: Sequence[int]) -> Mixture:
        """The mixture with these counts in a period, as `counts` gives them."""
        made = cls.__new__(cls)
        made._fill(list(counts))
        return made

    def _fill(self, counts: list[int]) -> None:
        self.counts = counts
        """Occurrences of each dataset in a period."""
        self.period = sum(self.counts)
        """D, the common denominator: dataset j has exactly counts[j] / D of the stream."""
        self._sequence = np.asarray(tijdeman(self.counts), dtype=np.int64)
        self._seen = np.empty(
            self.period, dtype=np.int64
        )  # earlier occurrences of the same dataset in the period
        for dataset in range(len(self.counts)):
            here = self._sequence == dataset
            self._seen[here] = np.arange(self.counts[dataset])

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """[n] positions of the stream -> [n] datasets and [n] positions within each dataset's own order."""
        turn, place = positions // self.period, positions % self.period
        dataset = self._sequence[place]
        return dataset, turn * np.asarray(self.counts, dtype=np.int64)[dataset] + self._seen[place]

    def positions(self, dataset: int, index: Ints) -> Ints:
        """[n] positions of a dataset's own order ([n] int64) -> [n] positions of the stream: the inverse of `locate`."""
        turn, nth = index // self.counts[dataset], index % self.counts[dataset]
        return turn * self.period + np.flatnonzero(self._sequence == dataset)[nth]

    def taken(self, length: int) -> list[int]:
        """How often each dataset occurs in the first `length` positions."""
        turns, rest = divmod(length, self.period)
        begun = np.bincount(self._sequence[:rest], minlength=len(self.counts)).tolist()
        return [turns * count + more for count, more in zip(self.counts, begun, strict=True)]


def quantise(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of the weights: exact where their common denominator allows, else rounded to COARSE_PERIOD.

    Rounding is by largest remainder, and every weight keeps at least 1, so that no dataset is lost.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    if not exact or any(weight <= 0 for weight in exact):
        raise ValueError("a mixture needs at least one weight, all of them above 0")
    denominator = lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * denominator) for weight in exact]
    common = gcd(*counts)
    counts = [count // common for count in counts]
    return counts if sum(counts) <= EXACT_PERIOD else _round_to(counts, COARSE_PERIOD)


def _round_to(counts: list[int], period: int) -> list[int]:
    total = sum(counts)
    rounded = [max(1, count * period // total) for count in counts]
    remainder = [count * period % total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda j: (-remainder[j], j))
    for j in by_remainder[: max(0, period - sum(rounded))]:
        rounded[j] += 1
    while sum(rounded) > period:  # the floor of 1 overshot: the largest gives
        rounded[rounded.index(max(rounded))] -= 1
    return rounded


def tijdeman(counts: Sequence[int]) -> list[int]:
    """The period: counts[j] times j, every prefix as even as the module's docstring says.

    The rule "among the j with w_j k - c_j >= 1/(2m-2) take the least (c_j + 1 - 1/(2m-2)) / w_j" is earliest deadline
    first: occurrence c of j may stand from position k = ceil((c + e) / w_j) on and must by floor((c + 1 - e) / w_j), with
    e = 1/(2m-2). So it is done with a heap, in whole numbers, O(D log m).
    """
    m, period = len(counts), sum(counts)
    if m == 1:
        return [0] * period
    scale = 2 * m - 2

    def window(j: int, c: int) -> tuple[int, int]:
        below = scale * counts[j]
        return -(-(scale * c + 1) * period // below), (scale * (c + 1) - 1) * period // below

    done = [0] * m
    waiting = [(window(j, 0)[0], j) for j in range(m)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    sequence: list[int] = []
    for k in range(1, period + 1):
        while waiting and waiting[0][0] <= k:
            j = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (window(j, done[j])[1], j))
        j = heapq.heappop(ready)[1]
        sequence.append(j)
        done[j] += 1
        if done[j] < counts[j]:
            heapq.heappush(waiting, (window(j, done[j])[0], j))
    return sequence
