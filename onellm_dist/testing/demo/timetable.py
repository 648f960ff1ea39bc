"""How long the demo takes: predicted before it starts, and corrected on one line while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import nn

from onellm_dist.common.progress import format_seconds
from onellm_dist.testing.demo.journal import Journal

REFERENCE_SPEED_S = 0.20
"""Seconds that `measure_slowdown` measures on one idle core of the reference machine, on which the
seconds of the stages were measured (AMD EPYC, Zen 5, 2025)."""
PLAIN_SECONDS = 15.0
"""Seconds between two lines where the output is not a terminal."""
LEAST_SHARE = 0.02
"""Below this share of a stage, its measured rate says nothing yet."""
LEAST_PREDICTED_S = 30
"""Finished stages of fewer predicted seconds say nothing about the later ones."""


def measure_slowdown() -> float:
    """Measure how many times slower one core of this machine is than one of the reference machine.

    The work is a small transformer block, forward and backward.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        block = nn.TransformerEncoderLayer(96, 4, 384, dropout=0.0, batch_first=True)
        x = torch.randn(16, 257, 96)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(4):
                block(x).square().mean().backward()
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return best / REFERENCE_SPEED_S


@dataclass
class DemoStage:
    """A row of the timetable."""

    name: str
    predicted: float
    """Predicted seconds."""
    taken: float | None = None
    """Seconds that it took; None until it has finished."""


class Timetable:
    """The stages in their order, and the progress line of the one that runs.

    Args:
        stages: the stages of the demo.
        journal: knows the stages that an earlier start finished, and records the others.
        out: where the lines are written; default: stderr.
    """

    def __init__(
        self, stages: Sequence[DemoStage], journal: Journal, out: TextIO | None = None
    ) -> None:
        self.stages = list(stages)
        for stage in self.stages:
            stage.taken = journal.seconds.get(stage.name)
        self._journal = journal
        self._out = out or sys.stderr
        self._current = -1
        self._started = 0.0
        self._last_line = 0.0

    def show(self) -> None:
        """Print the whole timetable."""
        for stage in self.stages:
            when = "done" if stage.taken is not None else f"about {format_seconds(stage.predicted)}"
            self._out.write(f"  {stage.name:<34} {when}\n")
        left = sum(s.predicted for s in self.stages if s.taken is None)
        self._out.write(f"  {'all':<34} about {format_seconds(left)}\n")
        self._out.flush()

    @property
    def taken(self) -> float:
        """Seconds of the finished stages, in this start and earlier ones.

        Of a stage that was interrupted, only its last attempt counts.
        """
        return sum(stage.taken or 0.0 for stage in self.stages)

    def start_stage(self) -> bool:
        """Start the next stage; returns False if an earlier start finished it."""
        self._current += 1
        if self.stages[self._current].taken is not None:
            return False
        self._started = time.monotonic()
        self._last_line = 0.0
        self.show_progress(0.0)
        return True

    def finish_stage(self) -> None:
        """Finish the current stage."""
        stage = self.stages[self._current]
        stage.taken = time.monotonic() - self._started
        self._journal.record_stage(stage.name, stage.taken)
        taken, predicted = format_seconds(stage.taken), format_seconds(stage.predicted)
        self._write(
            f"{self._format_head()} done in {taken} (expected: about {predicted})", last=True
        )

    def show_progress(self, share: float, doing: str = "") -> None:
        """Show the progress line.

        Args:
            share: share of the current stage that is done.
            doing: what is running.
        """
        now = time.monotonic()
        is_terminal = self._out.isatty()
        if not is_terminal and now - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = now
        here, everything = self.estimate_left(share, now - self._started)
        what = f": {doing}" if doing else ""
        line = (
            f"{self._format_head()}{what}, {100 * share:.0f}%, {format_seconds(here)} left here, "
            f"{format_seconds(everything)} in all"
        )
        self._write(line, last=not is_terminal)

    def estimate_left(self, share: float, elapsed: float) -> tuple[float, float]:
        """Estimate the seconds left.

        At the start of a stage only the prediction counts, at its end only the measured rate. Later
        stages are stretched as much as the finished ones were.

        Args:
            share: share of the current stage that is done.
            elapsed: seconds since its start.

        Returns:
            Seconds left of the current stage, and of the whole demo.
        """
        stretch = self._compute_stretch()
        here = max(0.0, self.stages[self._current].predicted * stretch * (1 - share))
        if share > LEAST_SHARE:
            here = (1 - share) * here + share * (elapsed / share * (1 - share))
        later = self.stages[self._current + 1 :]
        return here, here + sum(s.predicted for s in later if s.taken is None) * stretch

    def _compute_stretch(self) -> float:
        finished = [s for s in self.stages if s.taken is not None]
        predicted = sum(s.predicted for s in finished)
        taken = sum(s.taken or 0.0 for s in finished)
        return taken / predicted if predicted > LEAST_PREDICTED_S else 1.0

    def _format_head(self) -> str:
        return f"[{self._current + 1}/{len(self.stages)}] {self.stages[self._current].name}"

    def _write(self, line: str, *, last: bool) -> None:
        start = "\r\033[K" if self._out.isatty() else ""
        self._out.write(f"{start}{line}" + ("\n" if last else ""))
        self._out.flush()
