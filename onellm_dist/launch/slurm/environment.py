"""Ranks of a Slurm step.

`srun` starts Python without `RANK`; rank, world size and address are read from Slurm's variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.launch.variables import read_number

FIRST_PORT = 12000
PORTS = 20000
"""The ports stay below Linux's ephemeral range (from 32768), where any connection may hold one."""
PORT_STRIDE = 7919
"""A requeued start uses another port than the start before, whose ranks may still hold theirs."""


SHELLS = ("bash", "sh", "dash", "zsh", "fish", "tcsh", "csh", "ksh")


def is_interactive_shell(env: Mapping[str, str]) -> bool:
    """Whether this process was typed into the shell of `srun --pty`.

    Such a shell has the variables of task 0 of its step, and the other tasks (`-n4`) never come.
    """
    if "SLURM_PTY_PORT" not in env:
        return False
    try:
        parent = Path(f"/proc/{os.getppid()}/comm").read_text("utf-8").strip()
    except OSError:
        return False
    return parent in SHELLS and os.isatty(0)


def read_slurm_ranks(
    env: Mapping[str, str],
) -> tuple[int, int, int, int, str, int, str] | None:
    """Read the place of this task in its Slurm step.

    A batch script that runs without `srun` has SLURM_PROCID but no SLURM_STEP_ID: it is not a rank.

    Args:
        env: environment variables.

    Returns:
        (rank, world size, local rank, local world size, address, port, the variables), or None
        outside a step of several tasks.

    Raises:
        UsageError: the step's variables are incomplete.
    """
    world_size = read_number(env, "SLURM_STEP_NUM_TASKS", read_number(env, "SLURM_NTASKS", 1))
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env or world_size < 2:
        return None
    nodes = (
        env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    )
    if not nodes:
        raise UsageError(
            "SLURM_STEP_NODELIST is not set",
            "the ranks cannot find the host of rank 0.",
            "start with srun inside the job, or set MASTER_ADDR.",
        )
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    counts, node = (
        parse_tasks_per_node(tasks or str(world_size)),
        read_number(env, "SLURM_NODEID", 0),
    )
    if not 0 <= node < len(counts):
        raise UsageError(
            f"SLURM_NODEID={node}, and SLURM_STEP_TASKS_PER_NODE={tasks} names "
            f"{format_count(len(counts), 'node')}",
            "the local ranks cannot be counted.",
            "start with srun inside the job, and without variables of another job.",
        )
    job, restart = read_number(env, "SLURM_JOB_ID", 0), read_number(env, "SLURM_RESTART_COUNT", 0)
    return (
        read_number(env, "SLURM_PROCID"),
        world_size,
        read_number(env, "SLURM_LOCALID", 0),
        counts[node],
        env.get("MASTER_ADDR") or expand_hosts(nodes)[0],
        read_number(env, "MASTER_PORT", compute_port(job, restart)),
        "SLURM_PROCID and SLURM_STEP_NUM_TASKS",
    )


def compute_port(job: int, restart: int) -> int:
    """Compute the port at which the ranks of a start meet.

    Jobs that share a node get different ports, and so do the starts of one job.
    """
    return FIRST_PORT + (job + PORT_STRIDE * restart) % PORTS


def parse_tasks_per_node(text: str) -> list[int]:
    """Parse Slurm's tasks per node: `2(x3),1` is [2, 2, 2, 1].

    Raises:
        UsageError: `text` is not in Slurm's form.
    """
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise UsageError(
                f"tasks per node {text!r} is not in Slurm's form",
                "the local ranks cannot be counted.",
                "expected something like 8(x2).",
            )
        found += [int(match[1])] * int(match[2] or 1)
    return found


def expand_hosts(nodelist: str) -> list[str]:
    """Expand a node list into host names, in order: `n[1-2],login` is [n1, n2, login].

    Raises:
        UsageError: `nodelist` is not a host list as Slurm writes it.
    """
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):
        hosts += _expand_pattern(item)
    if not hosts:
        raise UsageError(
            f"node list {nodelist!r} is empty",
            "the ranks cannot find the host of rank 0.",
            "set MASTER_ADDR.",
        )
    return hosts


def _expand_pattern(pattern: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    names: list[str] = []
    for piece in match[1].split(","):
        first, dash, last = piece.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(
                f"node list {pattern!r} is not in Slurm's form",
                "the ranks cannot find the host of rank 0.",
                "set MASTER_ADDR.",
            )
        numbers = range(int(first), int(last or first) + 1)
        names += [before + str(number).zfill(len(first)) + after for number in numbers]
    return [host for name in names for host in _expand_pattern(name)]
