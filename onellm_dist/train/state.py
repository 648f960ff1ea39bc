"""What changes while a run trains, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onellm_dist.train.records.exit_file import EXIT_CODES


@dataclass
class TrainState:
    """The progress of a run, as one rank knows it. Equal on every rank.

    Attributes:
        first_step: index of the step at which this start, or the latest rollback, began.
        steps_done: optimizer steps done so far by the whole run, skipped ones included.
        lost_steps: steps that were done before `first_step` was chosen and are repeated.
        lost_seconds: seconds that these steps had taken.
    """

    first_step: int = 0
    steps_done: int = 0
    lost_steps: int = 0
    lost_seconds: float = 0.0

    @property
    def step(self) -> int:
        """Index of the step under way, or of the next one (the first is 0)."""
        return self.steps_done

    def begin(self, first_step: int, *, lost_steps: int = 0, lost_seconds: float = 0.0) -> None:
        """Continue at `first_step`: at a start, a resume or a rollback."""
        self.first_step = first_step
        self.steps_done = first_step
        self.lost_steps = lost_steps
        self.lost_seconds = lost_seconds


@dataclass(frozen=True)
class Outcome:
    """How a run ended that did not fail."""

    status: str
    """`done` or `preempted`."""
    reason: str
    """Why, for people."""
    steps_done: int
    """Optimizer steps done so far by the whole run."""
    run_dir: Path
    """The run directory."""

    @property
    def exit_code(self) -> int:
        """The exit code of a process that ends with this outcome."""
        return EXIT_CODES[self.status]
