"""Ranks that hold one model together: neighbours, who meet by themselves.

The ranks of a start are split into groups of equal size. Each group has a process group of its own,
whose store its first rank holds. They find each other by files of a folder that all ranks see: the
first one calls, the others answer with the names of their hosts, and it says where it listens. So a
group needs no other one, neither to begin nor to continue.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.logging import get_logger
from onellm_dist.common.refusals import describe_start
from onellm_dist.config.schema import StabilitySection
from onellm_dist.launch.local import find_free_port
from onellm_dist.launch.ranks import Ranks
from onellm_dist.train.distributed import Distributed, process_group, threads_per_rank
from onellm_dist.train.rendezvous import (
    FIRST_WORD_S,
    LOOPBACK,
    MACHINES_S,
    ONE_MACHINE_S,
    POLL_S,
    restrict_to_loopback,
)

log = get_logger(__name__)
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""torchrun's own store is that of all ranks."""
TIMEOUT_MINUTES = 15.0
"""A collective of a group waits this long, and `distributed.SLACK_MINUTES` more."""


@dataclass(frozen=True)
class _Meeting:
    """Where the ranks of a group meet."""

    address: str
    port: int
    is_on_one_machine: bool
    """Whether all ranks of the group are: launchers may hand neighbouring ones to different
    machines."""


@contextmanager
def join_group(ranks: Ranks, size: int, folder: Path) -> Iterator[Distributed]:
    """Join the other ranks of this rank's group for the time of the context.

    Args:
        ranks: this process's place among all ranks.
        size: ranks of a group; it divides their number.
        folder: where the ranks of groups find each other; made if missing.

    Raises:
        UsageError: this process sees too few GPUs.
        OneLLMError: a rank of the group did not come.
    """
    place = folder / f"group-{ranks.rank // size}.json"
    member = ranks.rank % size
    start = describe_start(ranks.address, ranks.port, os.environ)
    os.environ.pop(AGENT_STORE, None)
    folder.mkdir(parents=True, exist_ok=True)
    patience_s = ONE_MACHINE_S if ranks.are_on_one_machine else MACHINES_S
    if member:
        meeting = _answer_call(place, start, member, patience_s)
    else:
        meeting = _call_group(place, start, size, patience_s)
    together = meeting.is_on_one_machine
    if together:
        os.environ.update(restrict_to_loopback())
    own = replace(
        ranks,
        rank=member,
        world_size=size,
        address=meeting.address,
        port=meeting.port,
        # A machine may have as many ranks as a group, and these be of several groups.
        local_size_is_known=ranks.local_size_is_known
        and (together or ranks.local_world_size != size),
    )
    minutes = TIMEOUT_MINUTES
    patience = StabilitySection(
        hang_minutes=minutes,
        first_step_minutes=minutes,
        checkpoint_minutes=minutes,
        validation_minutes=minutes,
    )
    with process_group(own, patience) as joined:
        if ranks.local_size_is_known and "OMP_NUM_THREADS" not in os.environ:
            # Ranks of other groups compute on this machine too.
            torch.set_num_threads(threads_per_rank(ranks.local_world_size))
        if member == 0:
            for path in (place, *(_name_answer(place, other) for other in range(1, size))):
                path.unlink(missing_ok=True)
        yield joined


def _call_group(place: Path, start: str, size: int, patience_s: float) -> _Meeting:
    """Find out, as the first rank, where the others are, and say where they meet."""
    call: dict[str, Any] = {"start": start, "call": secrets.token_hex(8)}
    write_atomic(place, json.dumps(call))
    began, has_said = time.monotonic(), False
    hosts: dict[int, str] = {}
    while missing := sorted(set(range(1, size)) - hosts.keys()):
        for member in missing:
            with suppress(OSError, ValueError, KeyError):
                found = json.loads(_name_answer(place, member).read_text(encoding="utf-8"))
                if found["call"] == call["call"]:
                    hosts[member] = str(found["host"])
        waited, names = time.monotonic() - began, ", ".join(map(str, missing))
        if waited > FIRST_WORD_S and not has_said:
            log.warning("the first rank of a group waits for its ranks %s", names)
            has_said = True
        if waited > patience_s:
            raise OneLLMError(
                f"of {size} ranks of a group these did not come within {patience_s:.0f} s: {names}",
                f"the first one has called them in {place}.",
                "look at their logs, and check that all nodes see this folder.",
            )
        time.sleep(POLL_S)
    own = socket.gethostname()
    together = set(hosts.values()) <= {own}
    meeting = _Meeting(LOOPBACK if together else own, find_free_port(), together)
    write_atomic(place, json.dumps({**call, **asdict(meeting)}))
    return meeting


def _answer_call(place: Path, start: str, member: int, patience_s: float) -> _Meeting:
    """Tell the first rank where this one is; what an earlier start left leads nowhere."""
    deadline = time.monotonic() + patience_s
    answered = ""
    while time.monotonic() < deadline:
        found: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            found = json.loads(place.read_text(encoding="utf-8"))
        call = found.get("call", "") if found.get("start") == start else ""
        if call != answered:
            answer = {"call": call, "host": socket.gethostname()}
            write_atomic(_name_answer(place, member), json.dumps(answer))
            answered = call
        if call and "address" in found:
            meeting = _Meeting(found["address"], found["port"], found["is_on_one_machine"])
            with (
                suppress(OSError),
                socket.create_connection((meeting.address, meeting.port), timeout=5),
            ):
                return meeting
        time.sleep(POLL_S)
    raise OneLLMError(
        f"the first rank of the group did not come within {patience_s:.0f} s",
        f"it leaves its address in {place}.",
        "look at its log, and check that all nodes see this folder.",
    )


def _name_answer(place: Path, member: int) -> Path:
    """The file by which another rank of the group answers the first one."""
    return place.with_name(f"{place.stem}-{member}.json")
