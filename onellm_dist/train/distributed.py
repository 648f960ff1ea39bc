"""The ranks of a run while it runs: the process group, and the few messages that the loop sends itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist

from onellm_dist.launch.ranks import Ranks

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This rank among all, and its device."""

    rank: int
    size: int
    local_world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Rank 0: the one that writes files and talks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def sum(self, tensor: torch.Tensor) -> None:
        """Add `tensor` over the ranks, in place."""
        dist.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, by rank, on every rank."""
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def join(ranks: Ranks) -> World:
    """Take this process's device, meet the other ranks, and share the cores among the ranks of the node."""
    ranks.export()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # torchrun sets OMP_NUM_THREADS=1 and deepspeed leaves it unset (every rank then takes all cores).
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank(ranks.local_world))
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=TIMEOUT, device_id=device if cuda else None)
    return World(ranks.rank, ranks.world, ranks.local_world, device)


def threads_per_rank(local_world: int) -> int:
    """Cores this process may use, shared evenly among the ranks of the node; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_world))


def leave() -> None:
    """Meet the other ranks a last time and close the process group."""
    dist.barrier()
    dist.destroy_process_group()
