"""Packing: the samples of a step into micro-batches under two budget, balanced on cost, assigned to ranks.

Whole samples, no padding. Every rank gets the same number of micro-steps, the fewest for which a balanced packing was
found; a rank may be assigned nothing in a micro-step. Pure and deterministic: whole numbers, ties broken by position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ENOUGH = 1.05
"""A fullest micro-batch of at most this many times the mean cost is balanced enough to stop looking."""
ONE_BY_ONE = 512
"""Samples of a step, the smallest ones, that are placed one by one."""
EXTRA_ROUNDS = 2
"""How many more micro-steps a rank may be tried for better balance, once the budget hold."""
_FULL = np.iinfo(np.int64).max


@dataclass(frozen=True)
class ItemSizes:
    """What the samples of a step weigh; three arrays [n] int64, all > 0 but `encoder`, which is 0 for text only."""

    llm: Ints
    encoder: Ints
    cost: Ints


class _Used(NamedTuple):
    """What each bin holds, [bins] each."""

    llm: Ints
    encoder: Ints
    cost: Ints


@dataclass(frozen=True)
class TokenBudget:
    """Most LLM positions and encoder tokens of a micro-batch."""

    llm: int
    encoder: int


def too_large(loads: ItemSizes, budget: TokenBudget) -> int | None:
    """Index of the first sample that is larger than a cap, if there is one."""
    over = np.flatnonzero((loads.llm > budget.llm) | (loads.encoder > budget.encoder))
    return int(over[0]) if over.size else None


def pack(loads: ItemSizes, budget: TokenBudget, world: int) -> list[list[Ints]]:
    """Deals the samples: [world][micro-steps] arrays of indices, each ascending; no sample may be larger than a cap.

    In each micro-step the ranks get neighbours in cost (they wait for each other there), the costliest micro-step first,
    so that a lack of memory shows at once; the ranks' turns alternate, which evens out their totals.
    """
    bins, owner = _best_bins(loads, budget, world)
    cost = np.bincount(owner, weights=loads.cost, minlength=bins).astype(np.int64)
    order = np.argsort(-cost, kind="stable")
    by_bin = np.argsort(
        owner, kind="stable"
    )  # the samples of bin 0, of bin 1, ...; ascending in each
    ends = np.cumsum(np.bincount(owner, minlength=bins))
    members = np.split(by_bin, ends[:-1])
    assigned: list[list[Ints]] = [[] for _ in range(world)]
    for micro in range(bins // world):
        turn = order[micro * world : (micro + 1) * world].tolist()
        for rank, number in enumerate(turn if micro % 2 == 0 else reversed(turn)):
            assigned[rank].append(members[number])
    return assigned


def imbalance(loads: ItemSizes, owner: Ints, bins: int) -> float:
    """Cost of the fullest bin over the mean of all bins."""
    cost = np.bincount(owner, weights=loads.cost, minlength=bins)
    return float(cost.max() / cost.mean())


def _best_bins(loads: ItemSizes, budget: TokenBudget, world: int) -> tuple[int, Ints]:
    """The number of bins (a multiple of `world`) and the bin of each sample."""
    count = max(
        1,
        _ceil_div(int(loads.llm.sum()), budget.llm * world),
        _ceil_div(int(loads.encoder.sum()), budget.encoder * world),
    )
    found: tuple[float, int, Ints] | None = None
    tried = 0
    while found is None or tried <= EXTRA_ROUNDS:
        owner = _fill(loads, budget, count * world)
        if owner is not None:
            ratio = imbalance(loads, owner, count * world)
            if found is None or ratio < found[0]:
                found = ratio, count * world, owner
            if found[0] <= ENOUGH or len(loads.cost) <= count * world:
                break
            tried += 1
        count += max(1, count // 32)
    return found[1], found[2]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _fill(loads: ItemSizes, budget: TokenBudget, bins: int) -> Ints | None:
    """The bin of each sample, or None where this order of filling finds no room.

    Samples go largest first (by their shares of both budget and of the mean cost), each to the bin of least cost. The many
    are placed in rounds of one sample a bin, which is a few array operations a round; the smallest, which even out what
    the rounds left, and those that did not fit, one by one.
    """
    n = len(loads.cost)
    mean_cost = loads.cost.sum() / bins
    size = loads.cost / mean_cost + loads.llm / budget.llm + loads.encoder / budget.encoder
    order = np.argsort(-size, kind="stable")
    owner = np.full(n, -1, dtype=np.int64)
    used = _Used(*(np.zeros(bins, dtype=np.int64) for _ in range(3)))
    in_rounds = order[: max(0, n - ONE_BY_ONE)]
    for start in range(0, len(in_rounds), bins):
        items = in_rounds[start : start + bins]
        targets = np.argsort(used.cost, kind="stable")[: len(items)]
        fits = (used.llm[targets] + loads.llm[items] <= budget.llm) & (
            used.encoder[targets] + loads.encoder[items] <= budget.encoder
        )
        items, targets = items[fits], targets[fits]
        owner[items] = targets
        used.llm[targets] += loads.llm[items]
        used.encoder[targets] += loads.encoder[items]
        used.cost[targets] += loads.cost[items]
    for item in order[owner[order] < 0].tolist():
        no_room = (used.llm > budget.llm - loads.llm[item]) | (
            used.encoder > budget.encoder - loads.encoder[item]
        )
        target = int(np.where(no_room, _FULL, used.cost).argmin())
        if no_room[target]:
            return None
        owner[item] = target
        used.llm[target] += loads.llm[item]
        used.encoder[target] += loads.encoder[item]
        used.cost[target] += loads.cost[item]
    return owner
