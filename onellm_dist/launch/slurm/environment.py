"""Ranks of a Slurm step: `srun` starts Python without RANK, so the place of a process is read from Slurm's variables."""

from __future__ import annotations

import re
from collections.abc import Mapping

from onellm_dist.common.errors import UsageError

FIRST_PORT, PORTS = 12000, 20000
"""Below Linux's ephemeral ports (32768 on), which any connection of the node may hold."""
PORT_STRIDE = 7919
"""A requeued start has another port than the one before, whose ranks may still hold theirs."""


def slurm_ranks(env: Mapping[str, str]) -> tuple[int, int, int, int, str, int] | None:
    """(rank, world, local rank, local world, address, port) of this task, or None outside a step of several tasks.

    A batch script without `srun` has SLURM_PROCID too, but no SLURM_STEP_ID: it is no rank.

    Raises:
        UsageError: the step's variables are incomplete.
    """
    world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env or world < 2:
        return None
    nodes = (
        env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    )
    if not nodes:
        raise UsageError(
            "SLURM_STEP_NODELIST is not set",
            "the ranks cannot find rank 0's host.",
            "start with srun inside the job, or set MASTER_ADDR.",
        )
    local_rank = int(env.get("SLURM_LOCALID", 0))
    node = int(env.get("SLURM_NODEID", 0))
    local_world_size = tasks_per_node(
        env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(world)
    )[node]
    address = env.get("MASTER_ADDR") or expand_hosts(nodes)[0]
    port = int(
        env.get("MASTER_PORT")
        or rendezvous_port(
            int(env.get("SLURM_JOB_ID") or 0), int(env.get("SLURM_RESTART_COUNT") or 0)
        )
    )
    return int(env["SLURM_PROCID"]), world, local_rank, local_world_size, address, port


def rendezvous_port(job: int, restart: int) -> int:
    """Where the ranks of a start meet: jobs that share a node must not share a port."""
    return FIRST_PORT + (job + PORT_STRIDE * restart) % PORTS


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
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
    """`gpu[01-03,07]-ib,login` -> its host names, in order.

    Raises:
        UsageError: not a host list as Slurm writes it.
    """
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):
        hosts += _expand(item)
    if not hosts:
        raise UsageError(
            f"node list {nodelist!r} is empty",
            "the ranks cannot find rank 0's host.",
            "set MASTER_ADDR.",
        )
    return hosts


def _expand(pattern: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", pattern)
    if match is None:
        return [pattern]
    names: list[str] = []
    for piece in match[1].split(","):
        first, dash, last = piece.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(
                f"node list {pattern!r} is not in Slurm's form",
                "the ranks cannot find rank 0's host.",
                "set MASTER_ADDR.",
            )
        for number in range(int(first), int(last or first) + 1):
            names.append(
                pattern[: match.start()] + str(number).zfill(len(first)) + pattern[match.end() :]
            )
    return [host for name in names for host in _expand(name)]
