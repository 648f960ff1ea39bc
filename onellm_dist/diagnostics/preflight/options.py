"""What a preflight is asked to do, and what a process pretends to be in a rehearsal of one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common.errors import UsageError

PRETEND = "ONELLM_PREFLIGHT_PRETEND"
"""A JSON object that makes this process look faulty, for tests and rehearsals: see Pretence."""
ALL = "all-reduce of all ranks"
"""The phase in which every rank takes part: its errors are of no single node."""


@dataclass(frozen=True)
class Options:
    """Limits and places; seconds, GB/s (10^9 bytes a second) and MB/s (10^6)."""

    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    wait: float = 180.0
    """How long ranks that have not come are waited for (imports over a cold network file system take minutes)."""
    limit: float = 60.0
    """Longest time of each phase; a rank that is not through by then is named and left behind."""
    max_skew: float = 2.0
    """Largest difference between a node's clock and the nodes' median."""
    min_bandwidth: float = 0.0
    """GB/s that an all-reduce between two nodes must reach; 0: a node is only compared with the others."""
    min_disk: float = 0.0
    """MB/s that writing to the run directory must reach; 0: only compared."""
    megabytes: int = 0
    """Size of the all-reduced buffer; 0: 256 on GPUs, 16 on CPUs."""
    exclude_file: Path | None = None
    as_json: bool = False


@dataclass(frozen=True)
class Pretence:
    """What this process pretends; nothing by default."""

    node: str = ""
    clock: float = 0.0
    """Seconds that its clock is ahead."""
    link_delay: float = 0.0
    """Seconds that each of its all-reduces is late."""
    link_stuck: bool = False
    """Its all-reduces never begin."""
    free_bytes: int | None = None
    """Free space of every disk."""
    torch: str = ""
    """Another version."""
    stuck_in: str = ""
    """A phase that it never leaves."""
    gone_in: str = ""
    """A phase in which its process dies."""


def pretence_of(env: Mapping[str, str] = os.environ) -> Pretence:
    """What the environment asks this process to pretend.

    Raises:
        UsageError: the variable is set and no such object.
    """
    text = env.get(PRETEND, "")
    try:
        return Pretence(**json.loads(text)) if text else Pretence()
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{PRETEND}={text!r}: {error}",
            "it says what a process pretends in a rehearsal.",
            f"unset {PRETEND}.",
        ) from None


def node_name(pretence: Pretence, env: Mapping[str, str] = os.environ) -> str:
    """This node as Slurm's --exclude knows it; its host name elsewhere."""
    return pretence.node or env.get("SLURMD_NODENAME") or socket.gethostname()
