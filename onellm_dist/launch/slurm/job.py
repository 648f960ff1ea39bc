"""What a job script is rendered from, and the checks that need no cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onellm_dist.common.errors import UsageError
from onellm_dist.launch.slurm.programs import TRAINING, Program

Starter = Literal["srun", "torchrun", "deepspeed"]
ContainerRuntime = Literal["pyxis", "apptainer"]
STARTERS: tuple[Starter, ...] = ("srun", "torchrun", "deepspeed")
RUNTIMES: tuple[ContainerRuntime, ...] = ("pyxis", "apptainer")
LONGEST_GRACE_PERIOD_S = 65535
"""Limit of Slurm's `--signal`."""


@dataclass(frozen=True)
class SweepTask:
    """One run of a sweep: one task of a Slurm array."""

    run_dir: Path
    overrides: tuple[str, ...]
    """key=value that this run has beside those of the job; `run.dir` is one of them."""


@dataclass(frozen=True)
class SlurmJob:
    """A run as a Slurm job, or several as an array; or an evaluation."""

    recipe: str
    """A recipe file, or the name of one that ships; empty for a script that takes any recipe. Of an
    evaluation: the model's folder."""
    run_dir: Path
    """The run directory; of a sweep, the folder of all its run directories; of an evaluation, the
    folder of its answers."""
    nodes: tuple[int, int]
    """Fewest and most nodes. At each start Slurm gives as many as it can."""
    gpus_per_node: int
    """GPUs of each node; 0 on nodes without GPUs."""
    ranks_per_node: int
    overrides: tuple[str, ...] = ()
    """key=value of the recipe, with `run.dir` if it is not the recipe's. Of an evaluation: the
    arguments of `onellm evaluate` behind the model."""
    program: Program = TRAINING
    """What the ranks run."""
    evaluates: bool = False
    """Whether kept checkpoints answer `data.validation.tasks` in a job of their own."""
    end_arguments: tuple[str, ...] = ()
    """Further arguments of what decides after a start."""
    sweep: tuple[SweepTask, ...] = ()
    """The runs of an array; none for a job of one run."""
    starter: Starter = "srun"
    name: str = "onellm"
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    exclude: str = ""
    """Nodes to avoid, as Slurm writes lists: gpu[07,12]."""
    cpus_per_rank: int = 0
    """Cores of each rank; 0 takes whole nodes, whose cores the ranks share."""
    container: str = ""
    container_runtime: ContainerRuntime = "pyxis"
    mounts: tuple[str, ...] = ()
    """Folders that the container sees besides the working directory."""
    grace_period_s: int = 300
    """Seconds before the time limit at which the job is asked to stop; the last checkpoint must
    fit in."""
    max_requeues: int = 5
    """Failures in a row, without a new checkpoint between them, after which the job halts."""
    preflight: bool = False
    """Whether every node is checked before the ranks start."""
    python: str = "python"
    """The interpreter with onellm_dist on every node (in the container if there is one)."""
    command: str = ""
    """The `onellm launch` command that renders this job; shown at the top of the script."""


def parse_nodes(text: str) -> tuple[int, int]:
    """Parse a number of nodes: `2` is (2, 2), `1-4` is (1, 4).

    Raises:
        UsageError: `text` has neither of these forms.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most:
        raise UsageError(
            f"--nodes {text} is not a number of nodes",
            "Slurm would refuse the job.",
            "write 2, or 1-4 for up to four nodes.",
        )
    return fewest, most


def check_job(job: SlurmJob) -> None:
    """Refuse a job that cannot work.

    Raises:
        UsageError: an option is wrong; the error names it and the remedy.
    """
    _check_starter(job)
    _check_times(job)
    for option, value in (
        ("--job-name", job.name),
        ("--partition", job.partition),
        ("--account", job.account),
        ("--qos", job.qos),
        ("--exclude", job.exclude),
    ):
        if re.search(r"[\s'\"\\$`#(){}<>|&;*?!~]", value):
            raise UsageError(
                f"{option} {value!r} has spaces, quotes or shell characters",
                "it would break the script's header.",
                "write it without them.",
            )
    _check_texts(job)
    _check_mounts(job)


def _check_texts(job: SlurmJob) -> None:
    """Refuse line breaks and other control characters, which no quoting makes safe in a comment."""
    texts = {
        "the recipe": job.recipe,
        "run.dir": str(job.run_dir),
        "--python": job.python,
        "--container": job.container,
        "the command": job.command,
        **{f"--mount {path!r}": path for path in job.mounts},
        **{f"{item!r}": item for item in job.overrides},
        **{f"--array {item!r}": item for task in job.sweep for item in task.overrides},
    }
    for name, text in texts.items():
        if any(ord(c) < 32 or ord(c) == 127 for c in text):
            raise UsageError(
                f"{name} has a line break or another control character",
                "it would break the script.",
                "put a key=value into a recipe file, and rename a path.",
            )
    unsafe = re.search(r"[^A-Za-z0-9_.,:/+=@%-]", job.python)
    if job.starter == "deepspeed" and unsafe:
        raise UsageError(
            f"--with deepspeed: {unsafe[0]!r} in the path of Python, {job.python}",
            "the deepspeed runner passes it to a shell on each node without quotes.",
            "use --with srun, or a Python whose path has no spaces and special characters.",
        )


def _check_mounts(job: SlurmJob) -> None:
    for path in job.mounts:
        if job.container and re.search(r"[:,]", path):
            raise UsageError(
                f"--mount {path} has a colon or a comma",
                "the container runtimes separate mounts by them.",
                "rename the folder, or mount the one above it.",
            )


def _check_starter(job: SlurmJob) -> None:
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
            "add --ranks-per-node for a run on CPUs.",
        )
    if job.container and job.starter == "deepspeed":
        raise UsageError(
            "--container works with srun and torchrun only",
            "deepspeed starts its ranks through ssh, which ends up outside the container.",
            "use --with srun.",
        )


def _check_times(job: SlurmJob) -> None:
    if not re.fullmatch(r"\d+|(\d+-)?\d+(:\d+){0,2}", job.time):
        raise UsageError(
            f"--time {job.time} is not in Slurm's form",
            "the job would be refused.",
            "write minutes, hours:minutes:seconds or days-hours:minutes:seconds.",
        )
    if not 1 <= job.grace_period_s <= LONGEST_GRACE_PERIOD_S:
        raise UsageError(
            f"--grace-period {job.grace_period_s} is out of range",
            f"Slurm takes 1 to {LONGEST_GRACE_PERIOD_S} seconds.",
            "use several times the seconds that a checkpoint takes.",
        )
    if 2 * job.grace_period_s > parse_time_limit(job.time) > 0:
        raise UsageError(
            f"--grace-period {job.grace_period_s} is more than half of --time {job.time}",
            "the job would stop soon after its start.",
            "use a longer time or a shorter grace period.",
        )


def parse_time_limit(text: str) -> int:
    """Parse Slurm's `--time` into seconds: 90, 1:30, 24:00:00, 2-12, 2-12:30; 0 means no limit."""
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
