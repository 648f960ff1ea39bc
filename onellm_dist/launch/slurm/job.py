"""What a job script is rendered from, and the checks that need no cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onellm_dist.common.errors import UsageError

Starter = Literal["srun", "torchrun", "deepspeed"]
ContainerRuntime = Literal["pyxis", "apptainer"]
STARTERS: tuple[Starter, ...] = ("srun", "torchrun", "deepspeed")
RUNTIMES: tuple[ContainerRuntime, ...] = ("pyxis", "apptainer")


@dataclass(frozen=True)
class Job:
    """A run as a Slurm job."""

    recipe: str
    """As `onellm train` takes it: a file, or the name of one that ships."""
    run_dir: Path
    nodes: tuple[int, int]
    """Least and most nodes; Slurm gives as many as it can, at every start anew."""
    gpus_per_node: int
    """Also the number of ranks a node; 0 on nodes without GPUs."""
    ranks_per_node: int
    overrides: tuple[str, ...] = ()
    """key=value, `run.dir` among them where it is not the recipe's."""
    starter: Starter = "srun"
    name: str = "onellm"
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    exclude: str = ""
    """Nodes to keep away from, as Slurm writes lists: gpu[07,12]."""
    cpus_per_rank: int = 0
    """0: whole nodes are taken, and ranks share their cores."""
    container: str = ""
    container_runtime: ContainerRuntime = "pyxis"
    mounts: tuple[str, ...] = ()
    """Folders that the container sees besides the working directory."""
    grace_period_s: int = 300
    """Seconds before the time limit at which the job is told to stop; the last checkpoint must fit in."""
    max_requeues: int = 5
    """Failures in a row, without a new checkpoint between them, after which the job halts."""
    preflight: bool = False
    python: str = "python"
    """The interpreter that has onellm_dist, on every node (in the container where there is one)."""
    command: str = ""
    """The `onellm launch` line that this comes from; shown at the top of the script."""


def parse_nodes(text: str) -> tuple[int, int]:
    """`2` -> (2, 2), `1-4` -> (1, 4).

    Raises:
        UsageError: neither of these forms.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(
            f"--nodes {text} is no number of nodes",
            "Slurm would refuse the job.",
            "write 2, or 1-4 for as many of four as there are.",
        )
    return least, most


def check_job(job: Job) -> None:
    """Refuse what cannot work.

    Raises:
        UsageError: with the option and the remedy.
    """
    if job.starter not in STARTERS:
        raise UsageError(
            f"--with {job.starter} is unknown",
            "there are three ways to start ranks.",
            f"use one of: {', '.join(STARTERS)}.",
        )
    if job.container_runtime not in RUNTIMES:
        raise UsageError(
            f"--container-runtime {job.container_runtime} is unknown",
            "the script needs its command line.",
            f"use one of: {', '.join(RUNTIMES)}.",
        )
    if job.ranks_per_node < 1:
        raise UsageError(
            "no ranks: --gpus-per-node is 0",
            "each rank drives one GPU.",
            "give --ranks-per-node too, for a run on CPUs.",
        )
    if job.container and job.starter == "deepspeed":
        raise UsageError(
            "--container goes with srun and torchrun only",
            "deepspeed starts its ranks through ssh, which lands outside the container.",
            "use --with srun.",
        )
    if not re.fullmatch(r"\d+|(\d+-)?\d+(:\d+){0,2}", job.time):
        raise UsageError(
            f"--time {job.time} is not in Slurm's form",
            "the job would be refused.",
            "write minutes, hours:minutes:seconds or days-hours:minutes:seconds.",
        )
    if job.grace_period_s < 1 or job.grace_period_s > 65535:
        raise UsageError(
            f"--grace-period {job.grace_period_s} is out of range",
            "Slurm takes 1 to 65535 seconds.",
            "give the time that a checkpoint takes, several times over.",
        )
    if 2 * job.grace_period_s > time_limit_s(job.time) > 0:
        raise UsageError(
            f"--grace-period {job.grace_period_s} is more than half of --time {job.time}",
            "the job would stop soon after its start.",
            "give a longer time or a shorter grace period.",
        )
    for label, value in (
        ("--job-name", job.name),
        ("--partition", job.partition),
        ("--account", job.account),
        ("--qos", job.qos),
        ("--exclude", job.exclude),
    ):
        if re.search(r"[\s'\"\\$`#]", value):
            raise UsageError(
                f"{label} {value!r} has spaces or quotes",
                "it would break the script's header.",
                "write it without them.",
            )
    if "\n" in " ".join(job.overrides):
        raise UsageError(
            "a key=value has a line break",
            "it would break the script.",
            "put it into a recipe file.",
        )


def time_limit_s(text: str) -> int:
    """Seconds of Slurm's `--time`: 90, 1:30, 24:00:00, 2-12, 2-12:30; 0 means no limit."""
    days, dash, rest = text.rpartition("-")
    parts = [int(p) for p in rest.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    elif len(parts) == 2:
        hours, (minutes, seconds) = 0, (parts[0], parts[1])
    else:
        hours, minutes, seconds = parts[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
