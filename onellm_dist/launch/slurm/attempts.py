"""The history of a run's starts by a scheduler: `RUN_DIR/attempts.jsonl`.

The job script appends to it; reports read it. A start is called an attempt here. Slurm's variables
describe it; the scripts of other schedulers set our own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onellm_dist.common.run_files import ATTEMPTS
from onellm_dist.launch.slurm.environment import expand_hosts

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
RUNNING = "running"
JOB_VARIABLE = "ONELLM_JOB_ID"
"""Name of a job that is not Slurm's; the same in all of its starts."""
NODES_VARIABLE = "ONELLM_JOB_NODES"
"""Nodes of the job, separated by white space."""
ADDRESS_VARIABLE = "ONELLM_JOB_ADDRESS"
"""Where the ranks of the job meet: the host of rank 0."""
PORT_VARIABLE = "ONELLM_JOB_PORT"
LOST = "lost"
"""Status of an attempt that ended without a record: its node died, or the job was killed."""


@dataclass(frozen=True)
class Attempt:
    """One start of the job: a line of `attempts.jsonl`.

    A line is written at the start and another one at the end, with the same `job_id` and
    `restart_count`. The later line replaces the earlier one.
    """

    job_id: str
    restart_count: int
    """How often the scheduler had started the job before."""
    nodes: tuple[str, ...]
    start: str
    """Local time with its UTC offset: 2026-11-20T09:41:00+0000."""
    end: str | None = None
    status: str = RUNNING
    """running, done, failed, usage, preempted; lost if the next start found it still running."""
    steps_done: int | None = None
    """Optimizer steps done when it ended."""
    failed_step: int | None = None
    """Index of the step in progress when it failed."""
    reason: str = ""
    offending_samples: tuple[str, ...] = ()
    """Ids of the samples of the micro-batch that failed."""
    checkpoint: int | None = None
    """Steps done in the newest checkpoint when it ended."""
    action: str = ""
    """What the job script does after it: done, requeue or halt."""
    delay_s: int = 0
    """Seconds that the requeued job has to wait."""
    budget_lowered: bool = False
    """Whether the start ran out of memory and lowered the token budgets for the next start."""
    ranks: int | None = None
    """Ranks that the job script starts, on all nodes together."""


def get_local_time() -> str:
    """The local time with its UTC offset, as in `exit.json` and `events.jsonl`."""
    return time.strftime(TIME_FORMAT)


def make_attempt(env: Mapping[str, str], *, earlier: int = 0) -> Attempt:
    """Make the attempt that variables describe, starting now.

    Args:
        env: Slurm's variables, or `ONELLM_JOB_ID` and `ONELLM_JOB_NODES` of another scheduler.
        earlier: starts of the job before this one; only Slurm counts them itself.
    """
    if env.get(JOB_VARIABLE):
        hosts = tuple(env.get(NODES_VARIABLE, "").split())
        return Attempt(env[JOB_VARIABLE], earlier, hosts, get_local_time())
    nodes = env.get("SLURM_JOB_NODELIST", "")
    return Attempt(
        job_id=env.get("SLURM_JOB_ID", "0"),
        restart_count=int(env.get("SLURM_RESTART_COUNT") or 0),
        nodes=tuple(expand_hosts(nodes)) if nodes else (),
        start=get_local_time(),
    )


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Read every attempt, in order of its last line.

    An attempt that a later one found running is `lost`. Incomplete lines are ignored.
    """
    found: dict[tuple[str, int], Attempt] = {}
    path = run_dir / ATTEMPTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        attempt = _parse_attempt(line)
        if attempt is None:
            continue
        key = (attempt.job_id, attempt.restart_count)
        found.pop(key, None)
        found[key] = attempt
    attempts = list(found.values())
    return [
        replace(a, status=LOST) if a.status == RUNNING and a is not attempts[-1] else a
        for a in attempts
    ]


def count_attempts(attempts: Sequence[Attempt], env: Mapping[str, str]) -> int:
    """Count the starts of the job that `ONELLM_JOB_ID` names; 0 without the variable."""
    return sum(attempt.job_id == env.get(JOB_VARIABLE) for attempt in attempts)


def append_attempt(run_dir: Path, attempt: Attempt) -> None:
    """Append a line to `attempts.jsonl` and sync it to disk."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ATTEMPTS).open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(attempt)) + "\n")
        out.flush()
        os.fsync(out.fileno())


def _parse_attempt(line: str) -> Attempt | None:
    try:
        found: dict[str, Any] = json.loads(line)
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in found.items()
            if key in Attempt.__dataclass_fields__
        }
        return Attempt(**fields)
    except (AttributeError, ValueError, TypeError):
        return None
