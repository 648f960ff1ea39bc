"""What went wrong in a run: slow steps, stalls, skipped steps and samples, spikes, hangs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onellm_dist.report.entries import Entry, pick, to_number
from onellm_dist.report.records import RunRecords
from onellm_dist.report.starts import Start
from onellm_dist.report.time_account import compute_typical_seconds

SLOW_FACTOR = 3.0
"""A step is slow if it takes more than this many medians."""
SPIKE_FACTOR = 10.0
"""A gradient norm is a spike if it is more than this many medians of the steps before it."""
SPIKE_WINDOW = 50
"""Steps whose gradient norms are compared."""
ROUTINE_EVENTS = (
    "start",
    "end",
    "startup_timing",
    "checkpoint",
    "validation",
    "export",
    "data_phase",
    "pack_budget",
    "best_model",
    "grace_period_short",
)
"""Events that do not tell of anything wrong."""
_COUNTED_EVENTS = ("step_skipped", "skipped_samples", *ROUTINE_EVENTS)


@dataclass(frozen=True)
class SlowStep:
    """A step that took much longer than most."""

    step: int
    seconds: float
    times: float
    """Seconds of the step as a multiple of the median."""
    waited: float
    """Share of the step spent waiting for data."""
    start: int
    """Number of the start that did it."""


@dataclass(frozen=True)
class GradientSpike:
    """A gradient norm far above those of the steps before it."""

    step: int
    norm: float
    median_before: float


@dataclass(frozen=True)
class Incidents:
    """Everything that went wrong, worst first where there is an order."""

    typical_seconds: float
    """Seconds of the median step."""
    slow_steps: list[SlowStep]
    """The first step of each start is left out: it warms up."""
    slow_excess: float
    """Seconds that the slow steps took above the median."""
    checkpoints: list[Entry]
    """By the time they took, the longest first."""
    checkpoint_median: float
    """Seconds of the median checkpoint; 0 without checkpoints."""
    skipped_steps: list[Entry]
    skipped_samples: list[Entry]
    gradient_spikes: list[GradientSpike]
    other_events: list[Entry] = field(default_factory=list)
    """Events that are not routine: hangs, rollbacks, warnings, and unknown ones."""
    grace_period: float | None = None
    """Seconds between the job's signal and its end, if a start or a checkpoint recorded them."""

    @property
    def late_checkpoints(self) -> list[Entry]:
        """Checkpoints that took longer than the grace period."""
        limit = self.grace_period
        if limit is None:
            return []
        return [c for c in self.checkpoints if to_number(c.get("seconds")) > limit]


def find_incidents(records: RunRecords, starts: Sequence[Start]) -> Incidents:
    """Collect everything that somebody should know about."""
    typical = compute_typical_seconds(starts)
    slow = _find_slow_steps(starts, typical)
    checkpoints = sorted(
        records.select_events("checkpoint"), key=lambda event: -to_number(event.get("seconds"))
    )
    durations = [to_number(c.get("seconds")) for c in checkpoints]
    periods = [
        period
        for event in records.events
        if (period := pick(event, "grace_period_seconds")) is not None
    ]
    return Incidents(
        typical_seconds=typical,
        slow_steps=slow,
        slow_excess=sum(s.seconds - typical for s in slow),
        checkpoints=checkpoints,
        checkpoint_median=statistics.median(durations) if durations else 0.0,
        skipped_steps=records.select_events("step_skipped"),
        skipped_samples=records.skipped_samples,
        gradient_spikes=_find_spikes(records.steps),
        other_events=[e for e in records.events if e.get("event") not in _COUNTED_EVENTS],
        grace_period=to_number(periods[-1]) if periods else None,
    )


def describe_event(event: Entry) -> str:
    """An event's fields as a short text; long lists are cut."""
    return ", ".join(
        f"{key} {_shorten(value)}"
        for key, value in event.items()
        if key not in ("time", "at", "event") and value is not None
    )


def _find_slow_steps(starts: Sequence[Start], typical: float) -> list[SlowStep]:
    """The slow steps, the slowest first."""
    if typical <= 0:
        return []
    slow = [
        SlowStep(
            step=line["step"],
            seconds=to_number(line.get("seconds")),
            times=to_number(line.get("seconds")) / typical,
            waited=to_number(line.get("data_wait_fraction")),
            start=start.number,
        )
        for start in starts
        for line in start.steps[1:]
        if to_number(line.get("seconds")) > SLOW_FACTOR * typical
    ]
    return sorted(slow, key=lambda step: -step.seconds)


def _find_spikes(steps: Sequence[Entry]) -> list[GradientSpike]:
    spikes = list[GradientSpike]()
    recent = list[float]()
    for line in steps:
        norm = to_number(line.get("grad_norm"))
        if len(recent) >= SPIKE_WINDOW // 5:
            median = statistics.median(recent)
            if norm > SPIKE_FACTOR * median > 0:
                spikes.append(GradientSpike(int(line["step"]), norm, median))
        if norm > 0:
            recent = [*recent[-SPIKE_WINDOW + 1 :], norm]
    return spikes


def _shorten(value: Any, longest: int = 160) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        text = " ".join(f"{k}={_shorten(v, 60)}" for k, v in value.items())
    elif isinstance(value, list):
        more = f" and {len(value) - 4} more" if len(value) > 4 else ""
        text = ", ".join(_shorten(v, 60) for v in value[:4]) + more
    else:
        text = str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"
