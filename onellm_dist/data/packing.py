"""Packing: the samples of a step into micro-batches, within two token budgets and balanced on cost.

No sample is split, and nothing is padded. Every rank gets the same number of micro-batches, the
smallest number for which a balanced packing was found; a rank may receive no samples for a
micro-batch. The result is pure and deterministic: integers throughout, ties broken by position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

BALANCED = 1.05
"""The search stops when the fullest micro-batch costs at most this many times the mean."""
SINGLE_PLACEMENTS = 512
"""Samples of a step, the smallest ones, that are placed one by one."""
EXTRA_ROUNDS = 2
"""How many more micro-batches per rank may be tried for better balance once the budgets hold."""
_FULL = np.iinfo(np.int64).max


@dataclass(frozen=True)
class ItemSizes:
    """What the samples of a step take: three arrays [n] int64.

    All values are positive, except that `encoder` is 0 for samples without media.
    """

    llm: Ints
    """LLM positions."""
    encoder: Ints
    """Encoder tokens."""
    cost: Ints
    """Predicted cost of forward and backward."""


class _Used(NamedTuple):
    """What each bin holds, [bins] each."""

    llm: Ints
    encoder: Ints
    cost: Ints

    def add(self, bins: Ints | int, sizes: ItemSizes, items: Ints | int) -> None:
        """Put items into bins; no bin may occur twice."""
        self.llm[bins] += sizes.llm[items]
        self.encoder[bins] += sizes.encoder[items]
        self.cost[bins] += sizes.cost[items]


@dataclass(frozen=True)
class TokenBudget:
    """The maximum size of a micro-batch."""

    llm: int
    """LLM positions."""
    encoder: int
    """Encoder tokens."""


def find_too_large(sizes: ItemSizes, budget: TokenBudget) -> int | None:
    """Return the index of the first sample that exceeds the budget alone, or None."""
    over = np.flatnonzero((sizes.llm > budget.llm) | (sizes.encoder > budget.encoder))
    return int(over[0]) if over.size else None


def pack(sizes: ItemSizes, budget: TokenBudget, world_size: int) -> list[list[Ints]]:
    """Assign samples to micro-batches of ranks.

    In each micro-batch the ranks get bins of similar cost, because they wait for each other there.
    The costliest micro-batch comes first, so that a lack of memory shows at once, and the order of
    the ranks alternates, which evens out their totals.

    Args:
        sizes: sizes of the samples; none may exceed the budget alone.
        budget: maximum size of a micro-batch.
        world_size: number of ranks.

    Returns:
        [world_size][micro-batches] arrays of sample indices, each ascending.
    """
    bins, owner = _find_best_bins(sizes, budget, world_size)
    cost = np.bincount(owner, weights=sizes.cost, minlength=bins).astype(np.int64)
    order = np.argsort(-cost, kind="stable")
    by_bin = np.argsort(owner, kind="stable")  # the samples of bin 0, of bin 1, ..., ascending
    ends = np.cumsum(np.bincount(owner, minlength=bins))
    members = np.split(by_bin, ends[:-1])
    assigned: list[list[Ints]] = [[] for _ in range(world_size)]
    for micro in range(bins // world_size):
        turn = order[micro * world_size : (micro + 1) * world_size].tolist()
        for rank, number in enumerate(turn if micro % 2 == 0 else reversed(turn)):
            assigned[rank].append(members[number])
    return assigned


def compute_imbalance(sizes: ItemSizes, owner: Ints, bins: int) -> float:
    """Return the cost of the fullest bin over the mean of all bins."""
    cost = np.bincount(owner, weights=sizes.cost, minlength=bins)
    return float(cost.max() / cost.mean())


def _find_best_bins(sizes: ItemSizes, budget: TokenBudget, world_size: int) -> tuple[int, Ints]:
    """Return the number of bins (a multiple of `world_size`) and the bin of each sample."""
    count = max(
        1,
        _ceil_div(int(sizes.llm.sum()), budget.llm * world_size),
        _ceil_div(int(sizes.encoder.sum()), budget.encoder * world_size),
    )
    best: tuple[float, int, Ints] | None = None
    rounds = 0
    while best is None or rounds <= EXTRA_ROUNDS:
        bins = count * world_size
        owner = _fill(sizes, budget, bins)
        if owner is not None:
            ratio = compute_imbalance(sizes, owner, bins)
            if best is None or ratio < best[0]:
                best = ratio, bins, owner
            if best[0] <= BALANCED or len(sizes.cost) <= bins:
                break
            rounds += 1
        count += max(1, count // 32)
    return best[1], best[2]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _fill(sizes: ItemSizes, budget: TokenBudget, bins: int) -> Ints | None:
    """Return the bin of each sample, or None if filling in this order runs out of room.

    Samples are placed largest first (by their shares of both budgets and of the mean cost), each
    into the bin with the lowest cost. Most are placed in rounds of one sample per bin, which takes
    a few array operations per round. The smallest, which even out what the rounds left, and those
    that did not fit are placed one by one.
    """
    n = len(sizes.cost)
    mean_cost = sizes.cost.sum() / bins
    size = sizes.cost / mean_cost + sizes.llm / budget.llm + sizes.encoder / budget.encoder
    order = np.argsort(-size, kind="stable")
    owner = np.full(n, -1, dtype=np.int64)
    used = _Used(*(np.zeros(bins, dtype=np.int64) for _ in range(3)))
    in_rounds = order[: max(0, n - SINGLE_PLACEMENTS)]
    for start in range(0, len(in_rounds), bins):
        items = in_rounds[start : start + bins]
        targets = np.argsort(used.cost, kind="stable")[: len(items)]
        fits = (used.llm[targets] + sizes.llm[items] <= budget.llm) & (
            used.encoder[targets] + sizes.encoder[items] <= budget.encoder
        )
        items, targets = items[fits], targets[fits]
        owner[items] = targets
        used.add(targets, sizes, items)
    for item in order[owner[order] < 0].tolist():
        no_room = (used.llm > budget.llm - sizes.llm[item]) | (
            used.encoder > budget.encoder - sizes.encoder[item]
        )
        target = int(np.where(no_room, _FULL, used.cost).argmin())
        if no_room[target]:
            return None
        owner[item] = target
        used.add(target, sizes, item)
    return owner
