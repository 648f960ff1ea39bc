"""All-reduce bandwidth between pairs of nodes, to tell a slow node from its partners."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from onellm_dist.diagnostics.preflight.host import get_gpu_index

ROUNDS = 3
"""Partners of each node: a node that is slow with all of them is itself slow."""
PROBE_BYTES = 1 << 20
MEASURE_S = 2.0
"""About how long one measurement takes."""
MOST_REPEATS = 10


def make_rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Disjoint pairs for each round (the circle method).

    With an odd number one node pauses in each round. With three nodes or more, every node gets a
    partner in at least two rounds.
    """
    seats: list[str | None] = list(nodes) + ([None] if len(nodes) % 2 else [])
    count = len(seats)
    rounds = list[list[tuple[str, str]]]()
    for _ in range(min(ROUNDS, count - 1)):
        pairs = [(seats[i], seats[count - 1 - i]) for i in range(count // 2)]
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def measure_all_reduce(
    store: Any,
    rank: int,
    ranks: Sequence[int],
    *,
    megabytes: int,
    delay: float,
    limit: float,
    local_rank: int,
) -> float:
    """Bus bandwidth of an all-reduce in bytes/s, the best of several.

    It is 2 (n - 1) / n x bytes / seconds for n ranks.

    Args:
        store: a connection for this measurement alone, with a prefix for these ranks alone.
        rank: this rank.
        ranks: all ranks that take part.
        megabytes: size of the buffer; 0: 256 on GPUs, 16 on CPUs.
        delay: seconds by which this rank is late each time (simulated).
        limit: seconds after which a rank that does not answer is an error.
        local_rank: number of this rank on its node.

    Raises:
        RuntimeError: a rank of the group does not answer in time.
    """
    import torch
    from torch import distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", get_gpu_index(local_rank)) if cuda else torch.device("cpu")
    size = len(ranks)
    # NCCL's watchdog (torch 2.15) would abort over a stuck collective, which here is a result.
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
        probe = _time_all_reduce(torch.ones(PROBE_BYTES // 4, device=device), delay)
        probe = min(probe, _time_all_reduce(torch.ones(PROBE_BYTES // 4, device=device), delay))
        buffer = torch.ones((megabytes or (256 if cuda else 16)) * (1 << 20) // 4, device=device)
        expected = probe * buffer.numel() * 4 / PROBE_BYTES
        # All ranks must repeat equally often: the smallest wish decides.
        repeats = torch.tensor(
            [min(MOST_REPEATS, max(1, int(MEASURE_S / max(expected, 1e-6))))],
            dtype=torch.int64,
            device=device,
        )
        dist.all_reduce(repeats, op=dist.ReduceOp.MIN)
        best = min(_time_all_reduce(buffer, delay) for _ in range(int(repeats.item())))
        slowest = torch.tensor([best], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return 2 * (size - 1) / size * buffer.numel() * 4 / float(slowest.item())
    finally:
        dist.destroy_process_group()


def _time_all_reduce(buffer: Any, delay: float) -> float:
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
