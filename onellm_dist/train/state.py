"""What changes while a run trains."""

from __future__ import annotations

from dataclasses import dataclass


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
