"""Which start did which step, and which of its steps were lost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from onellm_dist.common import run_files
from onellm_dist.report.entries import to_number
from onellm_dist.report.records import RunRecords
from onellm_dist.report.starts import Start

BROKEN = ("failed", "lost")
"""Statuses of a start that did not end in good order."""


def assign_steps(records: RunRecords, starts: Sequence[Start]) -> None:
    """Give each start its lines of `metrics.jsonl` and its validation time.

    A valid line belongs to the last start that began at its step or earlier: a later start would
    have repeated the step.
    """
    trained = [s for s in starts if s.first_step is not None]
    for line in records.steps:
        owner = next(
            (s for s in reversed(trained) if (s.first_step or 0) <= line["step"]),
            trained[0] if trained else None,
        )
        if owner is not None:
            owner.steps.append(line)
    for line in records.validation:
        done = to_number(line.get("steps_done"))
        owner = next((s for s in reversed(trained) if (s.first_step or 0) < done), None)
        if owner is not None:
            owner.validation_seconds += to_number(line.get("seconds"))


def count_lost_steps(records: RunRecords, starts: Sequence[Start]) -> None:
    """Count the steps that each start lost.

    The next start records them (`lost_steps`); otherwise the steps that the job script recorded
    as done tell how many they were.
    """
    trained = [s for s in starts if s.first_step is not None]
    all_seconds = [to_number(line.get("seconds")) for line in records.steps]
    median_seconds = statistics.median(all_seconds) if all_seconds else 0.0
    for i, later in enumerate(trained[1:], 1):
        earlier = trained[i - 1]
        first = later.first_step or 0
        if later.repeats is not None:
            _share_lost_steps(trained[:i], first, *later.repeats)
        elif earlier.steps_done is not None and earlier.steps_done > first:
            earlier.lost_steps += earlier.steps_done - first
            earlier.lost_seconds += (earlier.steps_done - first) * median_seconds
            earlier.lost_known = False
    for line in records.overwritten:
        owner = next((s for s in reversed(trained) if (s.first_step or 0) <= line["step"]), None)
        if owner is not None:
            owner.lost_steps += 1
            owner.lost_seconds += to_number(line.get("seconds"))
    if not records.overwritten:  # the lines of rolled-back steps are gone: the events count them
        for start in trained:
            _count_rolled_back_steps(start, median_seconds)


def count_unsaved_steps(records: RunRecords, starts: Sequence[Start]) -> None:
    """Count the steps that the latest start lost, before another start has to repeat them.

    They are the steps after its newest checkpoint, if it was killed or failed.
    """
    last = starts[-1] if starts else None
    if last is None or last.first_step is None or last.status not in BROKEN:
        return
    saved = max(last.first_step, count_saved_steps(records))
    unsaved = [line for line in last.steps if line["step"] >= saved]
    last.steps = last.steps[: len(last.steps) - len(unsaved)]
    last.lost_steps += len(unsaved)
    last.lost_seconds += sum(to_number(line.get("seconds")) for line in unsaved)


def count_saved_steps(records: RunRecords) -> int:
    """Steps that the newest complete checkpoint contains; 0 without one.

    Events tell where the folder is not there (a copy of the run's records alone).
    """
    checkpoints = records.directory / run_files.CHECKPOINTS
    if not checkpoints.is_dir():
        saved = records.select_events("checkpoint")
        return max((int(to_number(event.get("steps_done"))) for event in saved), default=0)
    complete = checkpoints.glob(f"{run_files.CHECKPOINT_PREFIX}*/{run_files.CHECKPOINT_MANIFEST}")
    names = [path.parent.name.removeprefix(run_files.CHECKPOINT_PREFIX) for path in complete]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _count_rolled_back_steps(start: Start, median_seconds: float) -> None:
    for event in start.rollbacks:
        steps = int(to_number(event.get("lost_steps")))
        start.lost_steps += steps
        if "lost_seconds" in event:
            start.lost_seconds += to_number(event["lost_seconds"])
        else:
            start.lost_seconds += steps * median_seconds
            start.lost_known = False


def _share_lost_steps(earlier: Sequence[Start], first: int, steps: int, seconds: float) -> None:
    """Spread lost steps over the starts that did them, beginning with the latest.

    Args:
        earlier: the starts before the one that resumed.
        first: the step it resumed at.
        steps: how many steps have to be repeated.
        seconds: what these steps took.
    """
    left = steps
    for start in reversed(earlier):
        if left <= 0:
            return
        done = max(0, first + left - max(first, start.first_step or 0))
        own = left if start is earlier[0] else min(left, done)
        start.lost_steps += own
        start.lost_seconds += seconds * own / steps
        left -= own
