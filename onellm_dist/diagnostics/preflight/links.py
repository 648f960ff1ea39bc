"""All-reduce bandwidth, pair of nodes by pair of nodes, so that the slow one can be told from its partners."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from onellm_dist.diagnostics.preflight.host import gpu_index

ROUNDS = 3
"""Partners that each node is tried with: a node that is slow with all of them is slow itself."""
FIRST_BYTES = 1 << 20
SECONDS = 2.0
"""About how long a measurement goes on."""
MOST_TIMES = 10


def rounds_of(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Disjoint pairs, round after round (the circle method); with an odd number one node sits out each round.

    Every node gets a partner in at least two rounds where there are three nodes or more.
    """
    seats: list[str | None] = list(nodes) + ([None] if len(nodes) % 2 else [])
    count = len(seats)
    found = list[list[tuple[str, str]]]()
    for _ in range(min(ROUNDS, count - 1)):
        pairs = [(seats[i], seats[count - 1 - i]) for i in range(count // 2)]
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def all_reduce_speed(
    store: Any,
    rank: int,
    ranks: Sequence[int],
    *,
    megabytes: int,
    delay: float,
    limit: float,
    local_rank: int,
) -> float:
    """Bus bandwidth in bytes/s of an all-reduce among `ranks`: 2 (n - 1) / n x bytes / seconds, the best of several.

    Args:
        store: a connection of its own, with a prefix that only these ranks use.
        delay: seconds that this rank is late each time (a rehearsal).

    Raises:
        RuntimeError: a rank of the group does not answer in time.
    """
    import torch
    from torch import distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", gpu_index(local_rank)) if cuda else torch.device("cpu")
    size = len(ranks)
    # NCCL's watchdog would abort the process over a collective that does not come through; here that is a finding (torch 2.15).
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=ranks.index(rank),
        world_size=size,
        timeout=timedelta(seconds=limit),
        device_id=device if cuda else None,
    )
    try:
        probe = _timed(torch.ones(FIRST_BYTES // 4, device=device), delay)
        probe = min(probe, _timed(torch.ones(FIRST_BYTES // 4, device=device), delay))
        buffer = torch.ones((megabytes or (256 if cuda else 16)) * (1 << 20) // 4, device=device)
        ahead = probe * buffer.numel() * 4 / FIRST_BYTES
        # The first, smallest message also decides for all ranks alike how often the large one goes round.
        wish = torch.tensor(
            [min(MOST_TIMES, max(1, int(SECONDS / max(ahead, 1e-6))))],
            dtype=torch.int64,
            device=device,
        )
        dist.all_reduce(wish, op=dist.ReduceOp.MIN)
        best = min(_timed(buffer, delay) for _ in range(int(wish.item())))
        slowest = torch.tensor([best], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return 2 * (size - 1) / size * buffer.numel() * 4 / float(slowest.item())
    finally:
        dist.destroy_process_group()


def _timed(buffer: Any, delay: float) -> float:
    """Seconds of one all-reduce, from the moment that this rank could begin."""
    import torch
    from torch import distributed as dist

    if buffer.is_cuda:
        torch.cuda.synchronize(buffer.device)
    dist.barrier()
    started = time.perf_counter()
    if delay:
        time.sleep(delay)
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
    if buffer.is_cuda:
        torch.cuda.synchronize(buffer.device)
    return time.perf_counter() - started
