"""Whether a checkpoint fits into the notice that the job gives before it is ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from onellm_dist.progress import seconds_text
from onellm_dist.train.metrics import EVENTS

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
            self.compare(float(fields.get("seconds") or 0.0), f"the checkpoint of step {fields.get('step')} took")

    def at_start(self, run_dir: Path) -> None:
        """Compare with the last checkpoint of the starts before this one."""
        seconds = last_save(run_dir / EVENTS)
        if seconds is not None:
            self.compare(seconds, "the last checkpoint of an earlier start took")

    def compare(self, seconds: float, words: str) -> None:
        """Warn where `seconds` are more than the notice."""
        if self._notice is None or seconds <= self._notice:
            return
        self._tell(
            "notice_short", seconds=seconds, notice_seconds=self._notice,
            say=f"WARNING: {words} {seconds_text(seconds)}, the job gives {seconds_text(self._notice)} of notice before it ends: "
            "a preemption would lose work. Ask for more (onellm launch --signal-notice), or use a faster disk.",
        )  # fmt: skip


def last_save(events: Path) -> float | None:
    """Seconds of the newest checkpoint in `events.jsonl`; None where there is none."""
    try:
        lines = events.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if '"checkpoint"' not in line:
            continue
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.get("event") == "checkpoint":
            return float(found.get("seconds") or 0.0)
    return None
