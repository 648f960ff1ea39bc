"""What became of the steps of a run, as its directory says."""

from __future__ import annotations

import json
import operator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from onellm_dist.common.run_files import (
    CHECKPOINT_MANIFEST,
    CHECKPOINT_PREFIX,
    CHECKPOINTS,
    EXCLUDED,
    LISTED_PATTERN,
    METRICS,
    PROGRESS,
    SAMPLES,
    SKIPPED_PATTERN,
    STARTS,
)
from onellm_dist.train.records.json_lines import read_lines
from onellm_dist.train.records.left_out import read_left_out
from onellm_dist.train.records.stream_progress import PROGRESS_BYTES


class StepStatus(NamedTuple):
    """What became of a step."""

    state: str
    """`trained`, `skipped` (not applied), or `planned` (still to come)."""
    times_lost: int
    """How often it was done by a start that was thrown back to an earlier checkpoint."""
    saved: bool
    """Whether a complete checkpoint contains it: a kill now would not lose it."""


class RunStatus:
    """What a run directory says about the steps done so far; read once, also during the run.

    Args:
        run_dir: the run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        folder = run_dir / SAMPLES
        self.left_out: dict[str, str] = {
            entry["sample_id"]: entry["reason"]
            for path in [
                *sorted(folder.glob(SKIPPED_PATTERN)),
                *sorted(folder.glob(LISTED_PATTERN)),
                folder / EXCLUDED,
            ]
            for entry in read_left_out(path)
        }
        """Sample id (with its epoch) -> reason, of skipped and excluded samples."""
        self.lost = [
            (entry["first_step"], entry["lost_to"])
            for entry in read_lines(folder / STARTS)
            if type(entry.get("lost_to")) is int and type(entry.get("first_step")) is int
        ]
        """Ranges of steps [first, end) that a start repeated."""
        self.steps_done = _read_number(folder / PROGRESS)
        """Steps done so far."""
        self.skipped = _find_skipped_steps(run_dir / METRICS)
        """Steps that were not applied."""
        self.steps_saved = _count_saved_steps(run_dir / CHECKPOINTS)
        """Steps that the latest checkpoint contains."""

    def get_status(self, step: int) -> StepStatus:
        """What became of a step."""
        done = step < self.steps_done
        state = "planned" if not done else "skipped" if step in self.skipped else "trained"
        times_lost = sum(first <= step < end for first, end in self.lost)
        return StepStatus(state, times_lost, step < min(self.steps_saved, self.steps_done))


def _read_number(path: Path) -> int:
    try:
        return int(path.read_bytes()[:PROGRESS_BYTES])
    except (FileNotFoundError, ValueError):
        return 0


def _count_saved_steps(checkpoints: Path) -> int:
    folders = checkpoints.glob(f"{CHECKPOINT_PREFIX}*/{CHECKPOINT_MANIFEST}")
    numbers = [path.parent.name.removeprefix(CHECKPOINT_PREFIX) for path in folders]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _find_skipped_steps(path: Path) -> frozenset[int]:
    """Steps of `metrics.jsonl` that were not applied; of 10^5 lines only those few are parsed."""
    if not path.is_file():
        return frozenset()
    found: set[int] = set()
    with path.open("rb") as lines:
        for line in lines:
            if b'"applied": false' in line and line.endswith(b"}\n"):
                with suppress(ValueError, RecursionError, KeyError, TypeError):  # damaged
                    found.add(operator.index(json.loads(line)["step"]))
    return frozenset(found)
