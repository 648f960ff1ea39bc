"""What the files of a run directory tell about a start that has ended.

It imports nothing but the standard library, as the job script runs it outside the ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from onellm_dist.common.run_files import CHECKPOINTS, EVENTS, METRICS
from onellm_dist.launch.slurm.attempts import TIME_FORMAT, Attempt

TAIL_BYTES = 1 << 18
CHECKPOINT_PREFIX = "step-"


def count_steps_done(run_dir: Path, attempt: Attempt) -> int | None:
    """Count the steps of an attempt that could not record them itself.

    `metrics.jsonl` alone is not enough: until the attempt's `start` event, it holds the lines of
    earlier starts.

    Returns:
        Steps done, or None for an attempt that never reached training.
    """
    events = _read_newest_first(run_dir / EVENTS, most=None)
    start = next((event for event in events if event.get("event") == "start"), None)
    if start is None or not _belongs_to(start, attempt):
        return None
    lines = _read_newest_first(run_dir / METRICS)
    return next(
        (int(line["step"]) + 1 for line in lines if "step" in line), start.get("first_step")
    )


def get_checkpoint_seconds(run_dir: Path) -> float | None:
    """Seconds that the newest checkpoint took according to `events.jsonl`; None if unknown."""
    for event in _read_newest_first(run_dir / EVENTS):
        if event.get("event") == "checkpoint" and "seconds" in event:
            return float(event["seconds"])
    return None


def find_newest_checkpoint(run_dir: Path) -> int | None:
    """Steps done in the newest complete checkpoint: a checkpoint is renamed once it is complete."""
    folders = (run_dir / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*")
    names = [folder.name.removeprefix(CHECKPOINT_PREFIX) for folder in folders]
    return max((int(name) for name in names if name.isdigit()), default=None)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_newest_first(path: Path, most: int | None = TAIL_BYTES) -> Iterator[dict[str, Any]]:
    """Yield the objects in the last `most` bytes of a JSONL file (None: in all of it)."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0 if most is None else max(0, size - most))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _belongs_to(start: Mapping[str, Any], attempt: Attempt) -> bool:
    """Whether a `start` event was written in this attempt.

    Ranks started through ssh do not know the job's id. Their events are matched by time instead:
    rank 0's node and the job script use the same clock.
    """
    if start.get("slurm_job_id") is not None:
        restarts = start.get("slurm_restart_count") or 0
        return (str(start["slurm_job_id"]), restarts) == (attempt.job_id, attempt.restart_count)
    try:
        return datetime.strptime(str(start.get("time")), TIME_FORMAT) >= datetime.strptime(
            attempt.start, TIME_FORMAT
        )
    except ValueError:
        return False
