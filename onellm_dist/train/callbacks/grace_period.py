"""Whether a checkpoint fits into the notice that the job gives before it is ended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

NOTICE = "ONELLM_NOTICE_S"
"""Seconds of warning before the job's end; the job script sets it (`onellm launch --signal-notice`)."""


class Tell(Protocol):
    """`Events.write`."""

    def __call__(self, event: str, *, say: str = "", **fields: Any) -> None: ...


def notice_seconds(env: Mapping[str, str] = os.environ) -> float | None:
    """The notice, or None where the job tells none (or no number)."""
    try:
        seconds = float(env.get(NOTICE, ""))
    except ValueError:
        return None
    return seconds if seconds > 0 else None


class NoticeWatch:
    """Passes events on; a checkpoint that took longer than the notice is followed by an event `notice_short` and a warning.

    Args:
        tell: writes an event.
        notice: seconds; None watches nothing.
    """

    def __init__(self, tell: Tell, notice: float | None) -> None:
        self._tell, self._notice = tell, notice

    def __call__(self, event: str, *, say: str = "", **fields: Any) -> None:
        """Write the event, and the warning where it is due."""
        self._tell(event, say=say, **fields)
        if event == "checkpoint":
            self._compare(int(fields["step"]), float(fields["seconds"]))

    def _compare(self, step: int, seconds: float) -> None:
        if self._notice is None or seconds <= self._notice:
            return
        self._tell(
            "notice_short",
            step=step,
            seconds=seconds,
            notice_seconds=self._notice,
            say=f"WARNING: the checkpoint of step {step} took {seconds:.3g} s, the job gives {self._notice:g} s of "
            "notice before it ends: a preemption would lose work. Ask for more (onellm launch --signal-notice), or use a faster disk.",
        )
