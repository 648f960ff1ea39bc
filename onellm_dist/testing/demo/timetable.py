"""How long the demo will take: predicted before it starts, corrected while it runs, one line on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import nn

from onellm_dist.common.progress import seconds_text
from onellm_dist.testing.demo.journal import Journal

REFERENCE_SPEED_S = 0.20
"""What `measure_speed` takes on one idle core of the machine that the stages' seconds were measured on (AMD EPYC, Zen 5, 2025)."""
_PLAIN_SECONDS = 15.0


def measure_speed() -> float:
    """How many times slower one core of this machine is than the reference: a small transformer block, forward and backward."""
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
class Stage:
    """A row of the time table."""

    name: str
    predicted: float
    """Seconds."""
    taken: float | None = None
    """Seconds; None until it has ended."""


class Timetable:
    """The stages in their order, and the progress line of the one that runs.

    Args:
        journal: knows the stages that an earlier start ended, and is told of those that end.
    """

    def __init__(
        self, stages: Sequence[Stage], journal: Journal, out: TextIO | None = None
    ) -> None:
        self.stages = list(stages)
        self._out, self._journal = out or sys.stderr, journal
        for stage in self.stages:
            stage.taken = journal.seconds.get(stage.name)
        self._current = -1
        self._started = self._last_line = 0.0

    def show(self) -> None:
        """Print the whole table."""
        for stage in self.stages:
            when = "done" if stage.taken is not None else f"about {seconds_text(stage.predicted)}"
            print(f"  {stage.name:<34} {when}", file=self._out)
        left = sum(s.predicted for s in self.stages if s.taken is None)
        print(f"  {'all':<34} about {seconds_text(left)}", file=self._out, flush=True)

    @property
    def taken(self) -> float:
        """Seconds of the stages that ended, in this start or in one before (of a stage that was taken up again: since then)."""
        return sum(stage.taken or 0.0 for stage in self.stages)

    def start(self) -> bool:
        """The next stage begins; False where an earlier start ended it."""
        self._current += 1
        if self.stages[self._current].taken is not None:
            return False
        self._started, self._last_line = time.monotonic(), 0.0
        self.tell(0.0)
        return True

    def end(self) -> None:
        """The stage is over."""
        stage = self.stages[self._current]
        stage.taken = time.monotonic() - self._started
        self._journal.ended(stage.name, stage.taken)
        self._print(
            f"{self._head()} done in {seconds_text(stage.taken)} (about {seconds_text(stage.predicted)} was expected)",
            last=True,
        )

    def tell(self, share: float, doing: str = "") -> None:
        """Show the line: what runs, its share done, the seconds left of it and of all."""
        now = time.monotonic()
        terminal = self._out.isatty()
        if not terminal and now - self._last_line < _PLAIN_SECONDS:
            return
        self._last_line = now
        here, everything = self.left(share, now - self._started)
        what = f": {doing}" if doing else ""
        line = f"{self._head()}{what}, {100 * share:.0f}%, {seconds_text(here)} left here, {seconds_text(everything)} in all"
        self._print(line, last=not terminal)

    def left(self, share: float, elapsed: float) -> tuple[float, float]:
        """Seconds left of this stage and of all, given the share that is done.

        The prediction counts fully at the start of a stage and the measured rate at its end; later stages are stretched as
        those that ended were.
        """
        stage = self.stages[self._current]
        by_plan = max(0.0, stage.predicted * self._stretch() * (1 - share))
        here = (
            by_plan
            if share <= 0.02
            else (1 - share) * by_plan + share * (elapsed / share * (1 - share))
        )
        later = (
            sum(s.predicted for s in self.stages[self._current + 1 :] if s.taken is None)
            * self._stretch()
        )
        return here, here + later

    def _stretch(self) -> float:
        done = [s for s in self.stages if s.taken is not None]
        predicted = sum(s.predicted for s in done)
        return sum(s.taken or 0.0 for s in done) / predicted if predicted > 30 else 1.0

    def _head(self) -> str:
        return f"[{self._current + 1}/{len(self.stages)}] {self.stages[self._current].name}"

    def _print(self, line: str, *, last: bool) -> None:
        start = "\r\033[K" if self._out.isatty() else ""
        print(f"{start}{line}", file=self._out, end="\n" if last else "", flush=True)
