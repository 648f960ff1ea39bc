"""Ranks of a Slurm step.

`srun` starts Python without `RANK`; rank, world size and address are read from Slurm's variables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from onellm_dist.common.errors import UsageError

FIRST_PORT = 12000
PORTS = 20000
"""The ports stay below Linux's ephemeral range (from 32768), where any connection may hold one."""
PORT_STRIDE = 7919
"""A requeued start uses another port than the start before, whose ranks may still hold theirs."""


def read_slurm_ranks(env: Mapping[str, str]) -> tuple[int, int, int, int, str, int] | None:
    """Read the place of this task in its Slurm step.

    A batch script that runs without `srun` has SLURM_PROCID but no SLURM_STEP_ID: it is not a rank.

    Args:
        env: environment variables.

    Returns:
        (rank, world size, local rank, local world size, address, port), or None outside a step of
        several tasks.

    Raises:
        UsageError: the step's variables are incomplete.
    """
    world_size = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
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
    local_world_size = parse_tasks_per_node(tasks or str(world_size))[
        int(env.get("SLURM_NODEID", 0))
    ]
    job, restart = int(env.get("SLURM_JOB_ID") or 0), int(env.get("SLURM_RESTART_COUNT") or 0)
    return (
        int(env["SLURM_PROCID"]),
        world_size,
        int(env.get("SLURM_LOCALID", 0)),
        local_world_size,
        env.get("MASTER_ADDR") or expand_hosts(nodes)[0],
        int(env.get("MASTER_PORT") or compute_port(job, restart)),
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
