"""Where the allocated time of a run went, and how much of it made progress."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from onellm_dist.report.entries import to_number
from onellm_dist.report.starts import Start, get_stall_seconds

PARTS = (
    "progress",
    "data_wait",
    "lost",
    "skipped",
    "start_up",
    "checkpoints",
    "validation",
    "failed",
    "other",
)
"""`progress` and `data_wait` are the retained steps: together they are the goodput."""
LABELS = {
    "progress": "retained steps: computing",
    "data_wait": "retained steps: waiting for data",
    "lost": "lost steps",
    "skipped": "skipped steps",
    "start_up": "start-up",
    "checkpoints": "pauses for checkpoints",
    "validation": "validation",
    "failed": "nodes held by a failed start",
    "other": "everything else",
}
DEFINITION = """
Goodput is the share of the allocated time that made progress: the seconds of the retained optimizer
steps, divided by the time for which nodes were held, both multiplied by the number of ranks. A step
is retained if its update was applied and is part of the run as it stands. Steps after the last
checkpoint before a kill or a rollback are lost, because they had to be repeated; steps that were
skipped (a loss or a gradient was not finite, or a spike) do not count either. The seconds of a step
run from the request for its data to its update; the wait for data is part of them and is shown
separately. Nodes are held from the begin of the job's start (without a job script: of rank 0's
process) to its end. This includes the time in which a start had already failed and nobody had
noticed (a hang, a lost node), which is shown separately. Time in Slurm's queue is not allocated and
does not count.
""".strip().replace("\n", " ")


@dataclass(frozen=True)
class TimeAccount:
    """Rank-seconds by part; they sum to `allocated`."""

    parts: dict[str, float]
    allocated: float
    """Rank-seconds for which nodes were held."""
    wall: float
    """Seconds from the begin of the first start to the end of the last one, queue included."""
    queued: float
    """Seconds between starts."""
    estimated: bool
    """Whether the begin, end or lost seconds of some start are estimated and not recorded."""

    @property
    def goodput(self) -> float | None:
        """Share of the allocated time that made progress; None if no time was allocated."""
        if self.allocated <= 0:
            return None
        return (self.parts["progress"] + self.parts["data_wait"]) / self.allocated


def build_time_account(starts: Sequence[Start]) -> TimeAccount:
    """Add up the time of all starts."""
    total = dict.fromkeys(PARTS, 0.0)
    for start in starts:
        for name, seconds in split_seconds(start).items():
            total[name] += seconds * start.world_size
    end = max((s.end for s in starts), default=0.0)
    begin = min((s.begin for s in starts), default=0.0)
    known = all(
        s.begin_known and (s.end_known or s.status == "running") and s.lost_known for s in starts
    )
    return TimeAccount(
        parts=total,
        allocated=sum(total.values()),
        wall=end - begin,
        queued=sum(max(0.0, later.begin - earlier.end) for earlier, later in pairwise(starts)),
        estimated=not known,
    )


def split_seconds(start: Start) -> dict[str, float]:
    """Seconds of one start by part.

    They sum to the start's length, or to what its records say if that is more (clocks differ).
    """
    parts = dict.fromkeys(PARTS, 0.0)
    for line in start.steps:
        seconds = to_number(line.get("seconds"))
        if line.get("applied") is False:
            parts["skipped"] += seconds
            continue
        waited = seconds * min(1.0, max(0.0, to_number(line.get("data_wait_fraction"))))
        parts["data_wait"] += waited
        parts["progress"] += seconds - waited
    parts["lost"] = start.lost_seconds
    parts["checkpoints"] = sum(get_stall_seconds(c) for c in start.checkpoints)
    parts["validation"] = start.validation_seconds
    parts["start_up"] = _compute_startup_seconds(start)
    rest = "failed" if start.status in ("failed", "lost") else "other"
    parts[rest] = max(0.0, start.seconds - sum(parts.values()))
    return parts


def compute_typical_seconds(starts: Sequence[Start]) -> float:
    """The median step's seconds, the first step of each start left out; 0 without steps."""
    steady = [to_number(line.get("seconds")) for s in starts for line in s.steps[1:]]
    every = steady or [to_number(line.get("seconds")) for s in starts for line in s.steps]
    return statistics.median(every) if every else 0.0


def _compute_startup_seconds(start: Start) -> float:
    """Seconds before the first step began; all of its time if the start never came to a step.

    The wait in the queue is not part of it, and neither is the first step, which counts as a step.
    """
    if not start.steps and not start.lost_steps:
        return start.seconds
    recorded = sum(
        seconds
        for name, seconds in start.startup_seconds.items()
        if name not in ("scheduler", "first_step")
    )
    if start.steps and "first_step" in start.startup_seconds:
        # The wait for the first step's data is in both `data` and the step.
        first = start.steps[0]
        waited = to_number(first.get("seconds")) * to_number(first.get("data_wait_fraction"))
        recorded -= min(recorded, waited)
    return max(recorded, (start.trained_at or start.begin) - start.begin)
