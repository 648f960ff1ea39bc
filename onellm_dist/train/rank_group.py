"""Ranks that hold one model together: neighbours, who meet by themselves.

The ranks of a start are split into groups of equal size. Each group has a process group of its own,
whose store its first rank holds; where that listens stands in a file of a folder that all ranks
see. So a group needs no other one, neither to begin nor to go on.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.refusals import describe_start
from onellm_dist.config.schema import StabilitySection
from onellm_dist.launch.local import find_free_port
from onellm_dist.launch.ranks import Ranks
from onellm_dist.train.distributed import Distributed, process_group
from onellm_dist.train.rendezvous import LOOPBACK, MACHINES_S, POLL_S, restrict_to_loopback

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""torchrun's own store is that of all ranks."""
TIMEOUT_MINUTES = 15.0
"""A collective of a group waits this long, for media that are read too."""


@contextmanager
def join_group(ranks: Ranks, size: int, folder: Path) -> Iterator[Distributed]:
    """Join the other ranks of this rank's group for the time of the context.

    Args:
        ranks: this process's place among all ranks.
        size: ranks of a group; it divides their number.
        folder: where the groups leave their addresses; made if missing.

    Raises:
        UsageError: this process sees too few GPUs.
        OneLLMError: a rank of the group did not come.
    """
    place = folder / f"group-{ranks.rank // size}.json"
    member = ranks.rank % size
    first_local = ranks.local_rank - member
    on_one_machine = first_local >= 0 and first_local + size <= ranks.local_world_size
    start = describe_start(ranks.address, ranks.port, os.environ)
    os.environ.pop(AGENT_STORE, None)
    if on_one_machine:
        os.environ.update(restrict_to_loopback())
    if member == 0:
        address = LOOPBACK if on_one_machine else socket.gethostname()
        port = find_free_port()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps({"start": start, "address": address, "port": port}))
    else:
        address, port = _wait_for_address(place, start)
    own = replace(ranks, rank=member, world_size=size, address=address, port=port)
    minutes = TIMEOUT_MINUTES
    patience = StabilitySection(
        hang_minutes=minutes,
        first_step_minutes=minutes,
        checkpoint_minutes=minutes,
        validation_minutes=minutes,
    )
    with process_group(own, patience) as joined:
        if member == 0:
            place.unlink(missing_ok=True)
        yield joined


def _wait_for_address(place: Path, start: str) -> tuple[str, int]:
    """Where the group's first rank listens; a file that an earlier start left leads nowhere."""
    deadline = time.monotonic() + MACHINES_S
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, KeyError):
            found = json.loads(place.read_text(encoding="utf-8"))
            if found["start"] == start:
                address, port = str(found["address"]), int(found["port"])
                with socket.create_connection((address, port), timeout=5):
                    return address, port
        time.sleep(POLL_S)
    raise OneLLMError(
        f"the first rank of the group did not come within {MACHINES_S:.0f} s",
        f"it leaves its address in {place}.",
        "look at its log, and check that all nodes see this folder.",
    )
