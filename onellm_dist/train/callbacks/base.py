"""The base class of callbacks, with every hook that training calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from onellm_dist.train.records.metrics import Metric, StepMetrics

if TYPE_CHECKING:
    from onellm_dist.train.state import Outcome
    from onellm_dist.train.trainer import Trainer


class Callback:
    """Looks at a run, and contributes named numbers to the one reduction of each step.

    Subclasses override the hooks they need. Every hook is called on every rank, in the order of the
    callbacks, so a hook may use collectives if it does so on all ranks alike. A callback never
    decides what is trained: forward, backward, the decision about a step and its application belong
    to `Trainer.train_step`. An exception in a hook ends the run.

    A callback of a recipe (`train.callbacks`) is made without arguments; `self.trainer` is set
    before the first hook is called.

    Attributes:
        metrics: the metrics that this callback adds to `metrics.jsonl`.
        trainer: the trainer that calls the hooks.
    """

    metrics: ClassVar[tuple[Metric, ...]] = ()
    trainer: Trainer

    def attach(self, trainer: Trainer) -> None:
        """Keep the trainer; called once, before any other hook."""
        self.trainer = trainer

    def on_fit_start(self) -> None:
        """The run is built, and training is about to begin at `trainer.state.first_step`."""

    def before_first_step(self) -> None:
        """Every callback has begun (`on_fit_start`), and the first step of this start is next."""

    def on_step_start(self, step: int) -> None:
        """Optimizer step `step` is about to begin."""

    def before_forward_backward(self, step: int) -> None:
        """The micro-batches of a step are about to run."""

    def after_forward_backward(self, step: int) -> None:
        """The micro-batches of a step have run on this rank; nothing is reduced or applied yet."""

    def metrics_to_reduce(self, step: int) -> Mapping[str, float]:
        """This rank's values of `metrics` whose reduction is `sum`, `mean` or `max`.

        They take part in the step's one reduction. A value that is left out does not count.
        """
        return {}

    def metrics_to_record(self, step: int) -> Mapping[str, Any]:
        """Values of `metrics` whose reduction is `none`, after the step was applied or skipped."""
        return {}

    def on_metrics(self, metrics: StepMetrics) -> None:
        """The metrics of a step are complete."""

    def on_step_end(self, step: int) -> None:
        """A step has been applied or skipped, and reported."""

    def after_step(self, steps_done: int, *, stopping: bool) -> None:
        """Between two steps: the place for work that is due now and then.

        Args:
            steps_done: steps done so far.
            stopping: whether the run stops here because it was asked to.
        """

    def on_validation(self, steps_done: int) -> None:
        """The validation set has been run; the model is still in evaluation mode."""

    def on_validation_end(self, steps_done: int, loss: float) -> None:
        """A validation is over; `loss` is the same on every rank."""

    def on_text(self, name: str, text: str, steps_done: int) -> None:
        """A text is to be shown on a board, on rank 0 alone."""

    def on_checkpoint(self, steps_done: int, stall_seconds: float) -> None:
        """A checkpoint was started; training had to wait `stall_seconds` for it."""

    def on_rollback(self, step: int) -> None:
        """Step `step` went wrong; training continues at `trainer.state.first_step`."""

    def on_fit_end(self, outcome: Outcome) -> None:
        """The run is done or was preempted, and its last checkpoint is complete."""

    def close(self) -> None:
        """Release what the callback holds; also called after a failure, possibly twice."""
