"""Who am I in a distributed run: what the launcher says about this process, in one form for all launchers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from onellm_dist.common.errors import UsageError
from onellm_dist.launch.slurm.environment import slurm_ranks


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run, and where the ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    """Place among the ranks of this node; picks the GPU."""
    local_world_size: int
    """Ranks of this node; they share its cores."""
    address: str
    """Host of rank 0."""
    port: int

    def export(self) -> None:
        """Set the environment variables that torch and DeepSpeed read.

        `LOCAL_SIZE` (the deepspeed launcher sets it) is taken away: with it DeepSpeed 0.19 leaves 66 MiB a CPU rank in
        `/dev/shm` for ever, for an all-reduce that training never calls.
        """
        os.environ.pop("LOCAL_SIZE", None)
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port),
        )


def discover_ranks(env: Mapping[str, str] | None = None) -> Ranks | None:
    """What the launcher that started this process says, or None where no launcher did.

    `RANK` and `WORLD_SIZE` (deepspeed, torchrun, our own local launcher) come first; then a Slurm step (`srun`).

    Raises:
        UsageError: the variables contradict each other or are incomplete.
    """
    env = os.environ if env is None else env
    if "RANK" not in env or "WORLD_SIZE" not in env:
        found = slurm_ranks(env)
        return None if found is None else Ranks(*found)
    try:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", rank))
        local_world_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world_size)
        port = int(env.get("MASTER_PORT", 29500))
    except ValueError as error:
        raise UsageError(
            f"RANK, WORLD_SIZE, LOCAL_RANK or MASTER_PORT is no number: {error}",
            "the ranks cannot meet.",
            "start through deepspeed, torchrun or srun.",
        ) from None
    if not 0 <= rank < world_size:
        raise UsageError(
            f"RANK={rank} with WORLD_SIZE={world_size}",
            "ranks count from 0.",
            "unset both to start alone, or use a launcher.",
        )
    address = env.get("MASTER_ADDR", "127.0.0.1")
    return Ranks(rank, world_size, local_rank, local_world_size, address, port)
