"""Whether a checkpoint fits into the grace period that the job has before it is ended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

GRACE_PERIOD = "ONELLM_GRACE_PERIOD_S"
"""Seconds of warning before the job's end; the job script sets it (`onellm launch --grace-period`)."""


class Tell(Protocol):
    """`Events.write`."""

    def __call__(self, event: str, *, say: str = "", **fields: Any) -> None: ...


def grace_period_seconds(env: Mapping[str, str] = os.environ) -> float | None:
    """The grace period; None where the job sets none (or something that is not a number)."""
    try:
        seconds = float(env.get(GRACE_PERIOD, ""))
    except ValueError:
        return None
    return seconds if seconds > 0 else None


class GracePeriodWatch:
    """Passes events on; a checkpoint that took longer than the grace period is followed by an event `grace_period_short` and a warning.

    Args:
        tell: writes an event.
        grace_period: seconds; None watches nothing.
    """

    def __init__(self, tell: Tell, grace_period: float | None) -> None:
        self._tell, self._grace_period = tell, grace_period

    def __call__(self, event: str, *, say: str = "", **fields: Any) -> None:
        """Write the event, and the warning where it is due."""
        self._tell(event, say=say, **fields)
        if event == "checkpoint":
            self._compare(int(fields["steps_done"]), float(fields["seconds"]))

    def _compare(self, step: int, seconds: float) -> None:
        if self._grace_period is None or seconds <= self._grace_period:
            return
        self._tell(
            "grace_period_short",
            step=step,
            seconds=seconds,
            grace_period_seconds=self._grace_period,
            say=f"WARNING: the checkpoint of step {step} took {seconds:.3g} s, the job's grace period is "
            f"{self._grace_period:g} s: a preemption would lose work. Raise it (onellm launch --grace-period), or use a faster disk.",
        )
