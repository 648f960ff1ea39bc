"""Which rank answers what: a pure function of the costs and the number of ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Share items among ranks, the costliest first, each to the rank with the least so far.

    Args:
        costs: of each item.
        world_size: number of ranks.

    Returns:
        The items of each rank, the costliest first.
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(item)
        heapq.heappush(loads, (load + costs[item], rank))
    return ranks
