"""What went against a run: slow steps, checkpoint stalls, skipped steps, unreadable samples, spikes, roll-backs, hangs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onellm_dist.report.account import typical_step
from onellm_dist.report.attempts import Attempt, median, number, pick
from onellm_dist.report.read import Entry, RunFiles

SLOW_FACTOR = 3.0
"""A step is slow from this many medians on."""
SPIKE_FACTOR = 10.0
"""A gradient norm is a spike from this many medians of the steps before it on."""
SPIKE_WINDOW = 50
ROUTINE = (
    "start",
    "end",
    "phase",
    "checkpoint",
    "validation",
    "export",
    "data_phase",
    "best",
    "grace_period_short",
)
"""Events that tell of nothing wrong."""
_HANDLED = ("step_skipped", "skipped_samples", *ROUTINE)


@dataclass(frozen=True)
class SlowStep:
    """A step that took much longer than most."""

    step: int
    seconds: float
    times: float
    """Its seconds as a multiple of the median."""
    waited: float
    """Share of it spent waiting for data."""
    attempt: int


@dataclass(frozen=True)
class Troubles:
    """All of it, the worst first where there is an order."""

    typical: float
    """Seconds of the median step."""
    slow: list[SlowStep]
    """Each start's first step is left out: it warms up."""
    slow_excess: float
    """Seconds that the slow steps took over the median."""
    checkpoints: list[Entry]
    """By time taken, the longest first."""
    checkpoint_median: float
    skipped: list[Entry]
    skipped_samples: list[Entry]
    spikes: list[tuple[int, float, float]]
    """(step, gradient norm, the median of the steps before)."""
    others: list[Entry] = field(default_factory=list)
    """Events that are not routine: hangs, roll-backs, warnings, and what this version does not know."""
    grace_period: float | None = None
    """Seconds of warning that the job gives before its end, where a start or a save told it."""

    @property
    def late(self) -> list[Entry]:
        """Checkpoints that took longer than the grace period."""
        return [
            c
            for c in self.checkpoints
            if self.grace_period is not None and number(c.get("seconds")) > self.grace_period
        ]


def troubles_of(files: RunFiles, attempts: Sequence[Attempt]) -> Troubles:
    """Looks for everything that a person should know of."""
    typical = typical_step(attempts)
    slow = [
        SlowStep(
            s["step"],
            number(s.get("seconds")),
            number(s.get("seconds")) / typical,
            number(s.get("data_wait_fraction")),
            a.number,
        )
        for a in attempts
        for s in a.steps[1:]
        if typical > 0 and number(s.get("seconds")) > SLOW_FACTOR * typical
    ]
    slow.sort(key=lambda s: -s.seconds)
    checkpoints = sorted(files.of("checkpoint"), key=lambda e: -number(e.get("seconds")))
    grace = [n for e in files.events if (n := pick(e, "grace_period_seconds")) is not None]
    return Troubles(
        typical,
        slow,
        sum(s.seconds - typical for s in slow),
        checkpoints,
        median([number(c.get("seconds")) for c in checkpoints]),
        files.of("step_skipped"),
        files.skipped_samples,
        _spikes(files.steps),
        [e for e in files.events if e.get("event") not in _HANDLED],
        number(grace[-1]) if grace else None,
    )


def _spikes(steps: Sequence[Entry]) -> list[tuple[int, float, float]]:
    """Gradient norms far above those of the steps before."""
    found = []
    recent = list[float]()
    for line in steps:
        norm = number(line.get("grad_norm"))
        if len(recent) >= SPIKE_WINDOW // 5 and norm > SPIKE_FACTOR * median(recent) > 0:
            found.append((int(line["step"]), norm, median(recent)))
        if norm > 0:
            recent = [*recent[-SPIKE_WINDOW + 1 :], norm]
    return found


def words_of(event: Entry) -> str:
    """An event's fields as a short text; long lists are cut."""
    parts = []
    for key, value in event.items():
        if key in ("time", "at", "event") or value is None:
            continue
        parts.append(f"{key} {_short(value)}")
    return ", ".join(parts)


def _short(value: Any, most: int = 160) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        text = " ".join(f"{k}={_short(v, 60)}" for k, v in value.items())
    elif isinstance(value, list):
        text = ", ".join(_short(v, 60) for v in value[:4]) + (
            f" and {len(value) - 4} more" if len(value) > 4 else ""
        )
    else:
        text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"
