"""Ranks that `mpirun`, `mpiexec` or `jsrun` started.

Variables of Open MPI 4 and 5 (`OMPI_COMM_WORLD_*`, also set by IBM's jsrun), and of the PMI that
MPICH, Intel MPI and Cray's PALS share (`PMI_RANK`, `PMI_SIZE`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from onellm_dist.common.errors import UsageError
from onellm_dist.launch.slurm.environment import FIRST_PORT, PORTS
from onellm_dist.launch.variables import read_number

OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
PMI = (
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
    rank_name, size_name, *local_names = names
    rank, world_size = read_number(env, rank_name), read_number(env, size_name)
    source = f"{rank_name} and {size_name}"
    if world_size == 1:
        return rank, 1, 0, 1, "127.0.0.1", _compute_port(env), source
    local = [_read_first(env, found, rank_name) for found in local_names]
    address = env.get("MASTER_ADDR", "")
    if not address and local[1] != world_size:
        raise UsageError(
            f"{rank_name}={rank} of {world_size} is on one of several machines, and MASTER_ADDR is "
            "not set",
            "the ranks cannot find the host of rank 0.",
            "pass it to every rank: mpirun -x MASTER_ADDR=HOST (mpiexec -genv MASTER_ADDR HOST).",
        )
    return rank, world_size, *local, address or "127.0.0.1", _compute_port(env), source


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
