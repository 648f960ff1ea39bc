"""The place of this process in a distributed run, read in one form from every launcher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from onellm_dist.common.errors import UsageError
from onellm_dist.launch.mpi import read_mpi_ranks
from onellm_dist.launch.slurm.environment import is_interactive_shell, read_slurm_ranks
from onellm_dist.launch.variables import read_number

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the address at which the ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    """Rank within this node; it selects the GPU."""
    local_world_size: int
    """Ranks on this node; they share its cores."""
    address: str
    """Host of rank 0."""
    port: int
    source: str = field(default="", compare=False)
    """The environment variables that say so; "" where none does."""
    local_size_is_known: bool = True
    """False where no variable says it: `local_world_size` is then the least that it can be."""

    @property
    def are_on_one_machine(self) -> bool:
        """Whether all ranks are on this machine."""
        return self.local_size_is_known and self.local_world_size == self.world_size

    def export(self) -> None:
        """Set the environment variables that torch and DeepSpeed read.

        `LOCAL_SIZE`, which the deepspeed launcher sets, is removed: with it DeepSpeed 0.19 leaves
        66 MiB per CPU rank in `/dev/shm`, for an all-reduce that training never calls.
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
    """Read what the launcher that started this process set.

    `RANK` and `WORLD_SIZE` (deepspeed, torchrun, a PyTorchJob, our own local launcher) come first,
    then MPI's variables (`mpirun`), then those of a Slurm step (`srun`). `mpirun` comes before
    Slurm, because within a job it starts one Slurm task per node.

    Args:
        env: environment variables; default: those of this process.

    Returns:
        The ranks, or None if no launcher started this process.

    Raises:
        UsageError: the variables contradict each other or are incomplete; the error names them.
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        return _check_ranks(_read_torch_ranks(env))
    mpi = read_mpi_ranks(env)
    slurm = None if is_interactive_shell(env) else read_slurm_ranks(env)
    found = mpi or slurm
    if found is None:
        _refuse_partial_variables(env)
        return None
    _refuse_other_numbers(env, rank=found[0], world_size=found[1])
    return _check_ranks(Ranks(*found))


def check_launch_ranks(wanted: int | None, ranks: Ranks, *, typed: bool) -> None:
    """Refuse `launch.ranks` where a launcher, or a stray variable, says another number of ranks.

    A recipe may have the key for starts without a launcher, so there it counts only against
    variables that no launcher can have set.

    Args:
        wanted: `launch.ranks`.
        ranks: what the environment says.
        typed: whether the key was given on the command line.

    Raises:
        UsageError: they differ.
    """
    if wanted is None or wanted == ranks.world_size or not ranks.source:
        return
    if wanted == 1 and "SLURM" in ranks.source:  # our job scripts: a task is not a shell
        return
    if typed or (ranks.source.startswith("RANK") and "LOCAL_RANK" not in os.environ):
        raise UsageError(
            f"launch.ranks={wanted}, but {ranks.source} in the environment say that this process "
            f"is rank {ranks.rank} of {ranks.world_size}",
            "a process that is a rank already starts no ranks.",
            "remove launch.ranks, or unset these variables to start the ranks from here.",
        )


def _read_torch_ranks(env: Mapping[str, str]) -> Ranks:
    rank, world_size = read_number(env, "RANK"), read_number(env, "WORLD_SIZE")
    local_rank, size = _read_local_rank(env, rank, world_size)
    address = env.get("MASTER_ADDR") or "127.0.0.1"
    port = read_number(env, "MASTER_PORT", DEFAULT_PORT)
    return Ranks(
        rank,
        world_size,
        local_rank,
        local_rank + 1 if size is None else size,
        address,
        port,
        "RANK and WORLD_SIZE",
        local_size_is_known=size is not None,
    )


def _read_local_rank(env: Mapping[str, str], rank: int, world_size: int) -> tuple[int, int | None]:
    """Local rank and local world size: said, or what they must be (the size: None if unknown)."""
    size_name = "LOCAL_WORLD_SIZE" if env.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    if env.get("LOCAL_RANK") and env.get(size_name):
        return read_number(env, "LOCAL_RANK"), read_number(env, size_name)
    slurm = read_slurm_ranks(env)
    if slurm is not None and slurm[:2] == (rank, world_size):
        return read_number(env, "LOCAL_RANK", slurm[2]), slurm[3]
    if env.get("LOCAL_RANK"):
        # MASTER_ADDR is the name of rank 0's machine, also in a run on several: only a loopback
        # address says that there is one.
        one = world_size == 1 or _is_this_machine(env.get("MASTER_ADDR", ""))
        return read_number(env, "LOCAL_RANK"), world_size if one else None
    if "PET_NNODES" in env:  # a PyTorchJob starts one process per pod
        processes = env.get("PET_NPROC_PER_NODE", "1")
        if processes in ("1", ""):
            return 0, 1
        raise UsageError(
            f"PET_NPROC_PER_NODE={processes} is set in the environment, and LOCAL_RANK is not",
            "the job (a Kubernetes PyTorchJob) expects torchrun to start the ranks of each pod.",
            "start with: torchrun --module onellm_dist.train RECIPE ...",
        )
    if world_size == 1 or _is_this_machine(env.get("MASTER_ADDR", "")):
        return rank, read_number(env, size_name, world_size)
    raise UsageError(
        f"RANK={rank} and WORLD_SIZE={world_size} are set in the environment, and LOCAL_RANK is "
        "not",
        "which of the machine's GPUs is this rank's cannot be known.",
        "set LOCAL_RANK and LOCAL_WORLD_SIZE (0 and 1 for one process per machine or pod), start "
        "through deepspeed, torchrun or srun, or unset all of them to start without a launcher.",
    )


def _is_this_machine(address: str) -> bool:
    return address in ("", "localhost", "::1") or address.startswith("127.")


def _check_ranks(ranks: Ranks) -> Ranks:
    rank, world_size, local = ranks.rank, ranks.world_size, ranks.local_rank
    if not 0 <= rank < world_size:
        raise UsageError(
            f"{ranks.source} in the environment say rank {rank} of {world_size}",
            "ranks count from 0.",
            "unset these variables to start alone, or use a launcher.",
        )
    if not 0 <= local < ranks.local_world_size <= world_size:
        raise UsageError(
            f"LOCAL_RANK={local} of {ranks.local_world_size} on this machine, and {world_size}"
            " ranks in all",
            "local ranks count from 0, and no machine has more ranks than there are.",
            "correct LOCAL_RANK and LOCAL_WORLD_SIZE, or use a launcher.",
        )
    if not 0 < ranks.port < 1 << 16:
        raise UsageError(
            f"MASTER_PORT={ranks.port} is not a port",
            "the ranks cannot meet.",
            "use a number from 1024 to 65535.",
        )
    return ranks


def _refuse_other_numbers(env: Mapping[str, str], *, rank: int, world_size: int) -> None:
    """Refuse RANK or WORLD_SIZE alone where they say something else than the launcher."""
    for name, number in (("RANK", rank), ("WORLD_SIZE", world_size)):
        if name in env and read_number(env, name) != number:
            raise UsageError(
                f"{name}={env[name]} is set in the environment, and the launcher's own variables "
                f"say {number}",
                "one of them was left over from something else.",
                f"unset {name}.",
            )


def _refuse_partial_variables(env: Mapping[str, str]) -> None:
    """Refuse a process that was meant to be one of several, and does not know which."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"):
        if env.get(name):
            missing = " and ".join(other for other in ("RANK", "WORLD_SIZE") if other not in env)
            raise UsageError(
                f"{name}={env[name]} is set in the environment, and {missing} not",
                "a launcher sets all of them: this one was left over, or the others forgotten.",
                f"unset {name} to start without a launcher, or start through deepspeed, torchrun "
                "or srun.",
            )
    nodes = env.get("PET_NNODES", "1")
    if nodes not in ("", "1", "1:1"):
        raise UsageError(
            f"PET_NNODES={nodes} is set in the environment, and RANK is not",
            "the job (a Kubernetes PyTorchJob) expects torchrun: each pod would train alone.",
            "start with: torchrun --module onellm_dist.train RECIPE ...",
        )
