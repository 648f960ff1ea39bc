"""What a preflight is asked to do, and which faults a process simulates in tests of it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common.errors import UsageError

PRETEND = "ONELLM_PREFLIGHT_PRETEND"
"""A JSON object that makes this process look faulty, for tests: see `SimulatedFaults`."""
ALL = "all-reduce of all ranks"
"""The phase in which every rank takes part: its errors cannot be attributed to one node."""


@dataclass(frozen=True)
class PreflightOptions:
    """Limits and paths; seconds, GB/s (10^9 bytes per second) and MB/s (10^6)."""

    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    wait: float = 180.0
    """How long to wait for ranks that have not joined (imports over a cold network file system take
    minutes)."""
    limit: float = 60.0
    """Longest time of each phase; a rank that has not finished by then is named and left behind."""
    max_skew: float = 2.0
    """Largest difference in seconds between a node's clock and the nodes' median."""
    min_bandwidth: float = 0.0
    """GB/s that an all-reduce between two nodes must reach; 0: nodes are only compared."""
    min_disk: float = 0.0
    """MB/s that writing to the run directory must reach; 0: nodes are only compared."""
    megabytes: int = 0
    """Size of the all-reduced buffer; 0: 256 on GPUs, 16 on CPUs."""
    exclude_file: Path | None = None
    """Where to write the bad nodes."""
    as_json: bool = False


@dataclass(frozen=True)
class SimulatedFaults:
    """What this process pretends; nothing by default."""

    node: str = ""
    """Name of the node."""
    clock: float = 0.0
    """Seconds by which its clock is ahead."""
    link_delay: float = 0.0
    """Seconds by which each of its all-reduces is late."""
    link_stuck: bool = False
    """Whether the rank's all-reduces never begin."""
    free_bytes: int | None = None
    """Free space of every disk."""
    torch: str = ""
    """Version of torch."""
    stuck_in: str = ""
    """A phase that it never leaves."""
    gone_in: str = ""
    """A phase in which its process dies."""


def read_simulated_faults(env: Mapping[str, str] = os.environ) -> SimulatedFaults:
    """What the environment asks this process to pretend.

    Raises:
        UsageError: the variable is set to something else.
    """
    text = env.get(PRETEND, "")
    try:
        return SimulatedFaults(**json.loads(text)) if text else SimulatedFaults()
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{PRETEND}={text!r}: {error}",
            "it says which faults a process simulates in tests.",
            f"unset {PRETEND}.",
        ) from None


def get_node_name(simulated: SimulatedFaults, env: Mapping[str, str] = os.environ) -> str:
    """This node as Slurm's --exclude knows it; its host name elsewhere."""
    return simulated.node or env.get("SLURMD_NODENAME") or socket.gethostname()
