"""Ranks that `mpirun`, `mpiexec` or `jsrun` started.

Variables of Open MPI 4 and 5 (`OMPI_COMM_WORLD_*`, also set by IBM's jsrun), and of the PMI that
MPICH, Intel MPI and Cray's PALS share (`PMI_RANK`, `PMI_SIZE`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

from onellm_dist.common.errors import UsageError
from onellm_dist.launch.slurm.environment import FIRST_PORT, PORTS
from onellm_dist.launch.variables import read_number


class _Names(NamedTuple):
    """The variables of one kind of launcher; of several local ones the first counts."""

    rank: str
    world_size: str
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]


OPEN_MPI = _Names(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
PMI = _Names(
    "PMI_RANK",
    "PMI_SIZE",
    ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
    ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
)
JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PALS_APID")
"""Variables that are the same in all ranks of a start, and differ between two."""


def read_mpi_ranks(
    env: Mapping[str, str],
) -> tuple[int, int, int, int, str, int, str] | None:
    """Read the place of this process among those that an MPI launcher started.

    Args:
        env: environment variables.

    Returns:
        (rank, world size, local rank, local world size, address, port, the variables), or None if
        no MPI launcher started this process.

    Raises:
        UsageError: the variables are incomplete; the error names them.
    """
    if "OMPI_COMM_WORLD_SIZE" in env:
        names = OPEN_MPI
    elif "PMI_SIZE" in env and not _is_of_srun(env):
        names = PMI
    else:
        return None
    rank, world_size = read_number(env, names.rank), read_number(env, names.world_size)
    source = f"{names.rank} and {names.world_size}"
    if world_size == 1:
        return rank, 1, 0, 1, "127.0.0.1", _compute_port(env), source
    local_rank = _read_first(env, names.local_rank, names.rank)
    local_world_size = _read_first(env, names.local_world_size, names.rank)
    address = env.get("MASTER_ADDR", "")
    if not address and local_world_size != world_size:
        raise UsageError(
            f"{names.rank}={rank} of {world_size} is on one of several machines, and MASTER_ADDR "
            "is not set",
            "the ranks cannot find the host of rank 0.",
            "pass it to every rank: mpirun -x MASTER_ADDR=HOST (mpiexec -genv MASTER_ADDR HOST).",
        )
    address = address or "127.0.0.1"
    return rank, world_size, local_rank, local_world_size, address, _compute_port(env), source


def _is_of_srun(env: Mapping[str, str]) -> bool:
    """Whether srun has set PMI's variables too, for the same ranks."""
    size = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS")
    return (env.get("PMI_RANK"), env["PMI_SIZE"]) == (env.get("SLURM_PROCID"), size)


def _read_first(env: Mapping[str, str], names: tuple[str, ...], rank_name: str) -> int:
    for name in names:
        if env.get(name):
            return read_number(env, name)
    raise UsageError(
        f"{rank_name} is set in the environment, and {' or '.join(names)} is not",
        "which of the machine's GPUs is this rank's cannot be known.",
        "pass it to every rank, set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or start "
        "through srun, torchrun or deepspeed.",
    )


def _compute_port(env: Mapping[str, str]) -> int:
    """The port at which the ranks meet: given, or by the launcher's name for this start."""
    job = next((env[name] for name in JOB_NAMES if env.get(name)), "")
    default = FIRST_PORT + zlib.crc32(job.rpartition("@")[0].encode() or job.encode()) % PORTS
    return read_number(env, "MASTER_PORT", default)
