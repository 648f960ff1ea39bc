"""The run's history of starts under a scheduler: `RUN_DIR/attempts.jsonl`, appended to by the job script, read by reports."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onellm_dist.launch.slurm.environment import expand_hosts

ATTEMPTS = "attempts.jsonl"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
RUNNING, LOST = "running", "lost"
"""Not over yet; over without a word (its node died, or the job was killed)."""


@dataclass(frozen=True)
class Attempt:
    """One start of the job: a line of `attempts.jsonl`. It is written at the start and again at the end, with the same `job_id` and
    `restart_count`: the later line holds.
    """

    job_id: str
    restart_count: int
    """How often Slurm has requeued the job before this start."""
    nodes: tuple[str, ...]
    start: str
    """Local time with its offset: 2026-11-20T09:41:00+0000."""
    end: str | None = None
    status: str = RUNNING
    """running, done, failed, usage, preempted; lost where the next start found it still running."""
    steps_done: int | None = None
    """Steps done when it ended."""
    failed_step: int | None = None
    """Index of the step that was under way, where it failed."""
    reason: str = ""
    offending_samples: tuple[str, ...] = ()
    """Ids of the samples of the micro-step that failed."""
    checkpoint: int | None = None
    """Step of the newest checkpoint when it ended."""
    action: str = ""
    """What was decided at its end: done, requeue, halt."""
    delay_s: int = 0
    """Seconds that the requeued job was told to wait."""
    ranks: int | None = None
    """Ranks that the job script starts, on all nodes together."""


def now() -> str:
    """Local time with its offset, as in `exit.json` and `events.jsonl`."""
    return time.strftime(TIME_FORMAT)


def this_attempt(env: Mapping[str, str]) -> Attempt:
    """The start that Slurm's variables in `env` describe."""
    nodes = env.get("SLURM_JOB_NODELIST", "")
    return Attempt(
        env.get("SLURM_JOB_ID", "0"),
        int(env.get("SLURM_RESTART_COUNT") or 0),
        tuple(expand_hosts(nodes)) if nodes else (),
        now(),
    )


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Every start in order, each as its last line says; one that a later start found running is `lost`.

    A line cut short by a crash is passed over.
    """
    found: dict[tuple[str, int], Attempt] = {}
    path = run_dir / ATTEMPTS
    known = Attempt.__dataclass_fields__
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            fields: dict[str, Any] = json.loads(line)
            fields = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in fields.items()
                if key in known
            }
            attempt = Attempt(**fields)
        except (ValueError, TypeError):
            continue
        key = (attempt.job_id, attempt.restart_count)
        found.pop(key, None)
        found[key] = attempt
    attempts = list(found.values())
    return [
        replace(a, status=LOST) if a.status == RUNNING and a is not attempts[-1] else a
        for a in attempts
    ]


def append_attempt(run_dir: Path, attempt: Attempt) -> None:
    """Add a line, on the disk before this returns."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ATTEMPTS).open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(attempt)) + "\n")
        out.flush()
        os.fsync(out.fileno())
