"""Where the allocated time of a run went, and what of it made progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from onellm_dist.report.attempts import Attempt, median, number, stall

PARTS = (
    "progress",
    "data_wait",
    "lost",
    "skipped",
    "start_up",
    "checkpoints",
    "validation",
    "dead",
    "other",
)
"""`progress` and `data_wait` are the steps that counted: together they are the goodput."""
WORDS = {
    "progress": "steps that counted: computing",
    "data_wait": "steps that counted: waiting for data",
    "lost": "steps done in vain",
    "skipped": "skipped steps (not finite)",
    "start_up": "start-up",
    "checkpoints": "standing still for checkpoints",
    "validation": "validation",
    "dead": "held by a broken start",
    "other": "anything else",
}
DEFINITION = """
Goodput is the share of the allocated time that made progress: the seconds of the optimizer steps that counted, divided by the time
that nodes were held, both multiplied by the ranks of the start that they belong to. A step counts if it was applied and is part of
the run as it stands: steps done after the last checkpoint before a kill or a roll-back, which had to be done again, do not count, and
neither do steps that were skipped because a gradient was not finite. A step's seconds run from asking for its data to its update;
waiting for data is part of it and shown apart. Nodes are held from the start of the job's attempt (without a job script: of rank 0's
process) to its end, also while a start is broken already and nobody has noticed (a hang, a lost node: shown apart); time in Slurm's
queue is not allocated and counts for nothing.
""".strip().replace("\n", " ")


@dataclass(frozen=True)
class Account:
    """Rank-seconds by part; they sum to `allocated`."""

    parts: dict[str, float]
    allocated: float
    wall: float
    """Seconds from the first start's begin to the last one's end, queue included."""
    queued: float
    """Seconds between starts."""
    estimated: bool
    """Some start's begin, end or lost seconds are reckoned, not recorded."""

    @property
    def goodput(self) -> float | None:
        """Share of allocated time that made progress; None where no time was allocated."""
        return (
            (self.parts["progress"] + self.parts["data_wait"]) / self.allocated
            if self.allocated > 0
            else None
        )


def account_of(attempts: Sequence[Attempt]) -> Account:
    """Adds up all starts."""
    total = dict.fromkeys(PARTS, 0.0)
    for attempt in attempts:
        for name, seconds in split(attempt).items():
            total[name] += seconds * attempt.world
    wall = max((a.end for a in attempts), default=0.0) - min(
        (a.begin for a in attempts), default=0.0
    )
    queued = sum(max(0.0, b.begin - a.end) for a, b in pairwise(attempts))
    estimated = any(
        not (a.begin_known and (a.end_known or a.status == "running") and a.lost_known)
        for a in attempts
    )
    return Account(total, sum(total.values()), wall, queued, estimated)


def split(attempt: Attempt) -> dict[str, float]:
    """Seconds of one start by part; they sum to its length, or to what its steps and phases say where that is more (clocks differ)."""
    found = dict.fromkeys(PARTS, 0.0)
    for line in attempt.steps:
        seconds = number(line.get("seconds"))
        if line.get("applied") is False:
            found["skipped"] += seconds
            continue
        waited = seconds * min(1.0, max(0.0, number(line.get("data_wait_fraction"))))
        found["data_wait"] += waited
        found["progress"] += seconds - waited
    found["lost"] = attempt.lost_seconds
    found["checkpoints"] = sum(stall(c) for c in attempt.checkpoints)
    found["validation"] = attempt.validation_seconds
    found["start_up"] = start_up(attempt)
    found["dead" if attempt.status in ("failed", "lost") else "other"] = max(
        0.0, attempt.seconds - sum(found.values())
    )
    return found


def start_up(attempt: Attempt) -> float:
    """Seconds before the first step began: its phases without the scheduler's and without the step itself, which counts as a step.

    Of a start that never came to a step, all of its time.
    """
    if not attempt.steps and not attempt.lost_steps:
        return attempt.seconds
    told = sum(
        seconds
        for name, seconds in attempt.phases.items()
        if name not in ("scheduler", "first_step")
    )
    if (
        attempt.steps and "first_step" in attempt.phases
    ):  # the wait for the first step's data is in both `data` and the step
        first = attempt.steps[0]
        told -= min(told, number(first.get("seconds")) * number(first.get("data_wait_fraction")))
    return max(told, (attempt.trained_at or attempt.begin) - attempt.begin)


def resume_seconds(attempt: Attempt) -> float | None:
    """From the end of the start before to the first new step done; None where no phase was recorded."""
    return sum(attempt.phases.values()) if set(attempt.phases) - {"scheduler"} else None


def typical_step(attempts: Sequence[Attempt]) -> float:
    """The median step's seconds, each start's first step left out."""
    steady = [number(s.get("seconds")) for a in attempts for s in a.steps[1:]]
    return median(steady or [number(s.get("seconds")) for a in attempts for s in a.steps])
