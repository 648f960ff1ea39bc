"""The ranks of a run while it runs: the process group, and the few messages that the loop sends itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as torch_dist
from torch.distributed import distributed_c10d

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import StabilitySection
from onellm_dist.launch.ranks import Ranks

T = TypeVar("T")
SLACK_MINUTES = 5.0
"""A collective gives up so much later than the watchdog does: who hangs is said by the watchdog, with stacks, not by a timeout."""


@dataclass(frozen=True)
class Distributed:
    """This rank among all, and its device."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        """Rank 0: the one that writes files and talks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        torch_dist.barrier()

    def sum(self, tensor: torch.Tensor) -> None:
        """Add `tensor` over the ranks, in place."""
        torch_dist.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, by rank, on every rank."""
        found: list[T | None] = [None] * self.world_size
        torch_dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        box = [value]
        torch_dist.broadcast_object_list(box, src=0)
        return box[0]


def join(ranks: Ranks, guard: StabilitySection | None = None) -> Distributed:
    """Take this process's device, meet the other ranks, and share the cores among the ranks of the node.

    Args:
        guard: collectives wait longer than any of its limits, also those of groups that the engines make.

    Raises:
        UsageError: this process sees several GPUs, but fewer than the node has ranks.
    """
    ranks.export()
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device(
            "cuda", gpu_of(ranks.local_rank, ranks.local_world_size, torch.cuda.device_count())
        )
        os.environ["LOCAL_RANK"] = str(
            device.index
        )  # DeepSpeed 0.19 takes the GPU of this number, and uses it for nothing else here
        torch.cuda.set_device(device)
    # torchrun sets OMP_NUM_THREADS=1 and deepspeed leaves it unset (every rank then takes all cores).
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank(ranks.local_world_size))
    backend = "nccl" if cuda else "gloo"
    timeout = timeout_of(guard or StabilitySection())
    # torch 2.15 gives every group that is made without one its own default: 10 minutes with NCCL, less than stability.hang_minutes.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    torch_dist.init_process_group(
        backend,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    return Distributed(ranks.rank, ranks.world_size, ranks.local_world_size, device)


def timeout_of(stability: StabilitySection) -> timedelta:
    """How long a collective waits: longer than the watchdog in any phase."""
    limits = (
        stability.hang_minutes,
        stability.first_step_minutes,
        stability.checkpoint_minutes,
        stability.validation_minutes,
    )
    return timedelta(minutes=max(limits) + SLACK_MINUTES)


def gpu_of(local_rank: int, local_world_size: int, visible: int) -> int:
    """Index of this rank's GPU among those that its process sees: its own, or the only one where each task is shown one.

    Raises:
        UsageError: the process sees several, but fewer than the node has ranks.
    """
    if visible == 1:
        return 0
    if visible < local_world_size:
        raise UsageError(
            f"{local_world_size} ranks on this node, and this process sees {visible} GPUs",
            "two ranks cannot share a GPU, NCCL refuses it.",
            f"start {visible} ranks a node, or show each rank every GPU (--gpus-per-node) or its own alone (--gpus-per-task=1).",
        )
    return local_rank


def threads_per_rank(local_world_size: int) -> int:
    """Cores this process may use, shared evenly among the ranks of the node; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_world_size))


def leave() -> None:
    """Meet the other ranks a last time and close the process group."""
    torch_dist.barrier()
    torch_dist.destroy_process_group()
