"""Several callbacks as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.records.metrics import StepMetrics

if TYPE_CHECKING:
    from onellm_dist.train.state import Outcome
    from onellm_dist.train.trainer import Trainer


class CallbackList(Callback):
    """Passes every hook on to its callbacks, in their order.

    Args:
        callbacks: the callbacks.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = list(callbacks)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    def attach(self, trainer: Trainer) -> None:
        for callback in self._callbacks:
            callback.attach(trainer)

    def on_fit_start(self) -> None:
        for callback in self._callbacks:
            callback.on_fit_start()
        for callback in self._callbacks:
            callback.before_first_step()

    def on_step_start(self, step: int) -> None:
        for callback in self._callbacks:
            callback.on_step_start(step)

    def before_forward_backward(self, step: int) -> None:
        for callback in self._callbacks:
            callback.before_forward_backward(step)

    def after_forward_backward(self, step: int) -> None:
        for callback in self._callbacks:
            callback.after_forward_backward(step)

    def metrics_to_reduce(self, step: int) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for callback in self._callbacks:
            found |= callback.metrics_to_reduce(step)
        return found

    def metrics_to_record(self, step: int) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for callback in self._callbacks:
            found |= callback.metrics_to_record(step)
        return found

    def on_metrics(self, metrics: StepMetrics) -> None:
        for callback in self._callbacks:
            callback.on_metrics(metrics)

    def on_step_end(self, step: int) -> None:
        for callback in self._callbacks:
            callback.on_step_end(step)

    def after_step(self, steps_done: int, *, stopping: bool) -> None:
        for callback in self._callbacks:
            callback.after_step(steps_done, stopping=stopping)

    def on_validation(self, steps_done: int) -> None:
        for callback in self._callbacks:
            callback.on_validation(steps_done)

    def on_validation_end(self, steps_done: int, loss: float) -> None:
        for callback in self._callbacks:
            callback.on_validation_end(steps_done, loss)

    def on_text(self, name: str, text: str, steps_done: int) -> None:
        for callback in self._callbacks:
            callback.on_text(name, text, steps_done)

    def on_checkpoint(self, steps_done: int, stall_seconds: float) -> None:
        for callback in self._callbacks:
            callback.on_checkpoint(steps_done, stall_seconds)

    def on_rollback(self, step: int) -> None:
        for callback in self._callbacks:
            callback.on_rollback(step)

    def on_fit_end(self, outcome: Outcome) -> None:
        for callback in self._callbacks:
            callback.on_fit_end(outcome)

    def close(self) -> None:
        """Close every callback, the last one first, also where closing one of them fails."""
        with ExitStack() as stack:
            for callback in self._callbacks:
                stack.callback(callback.close)
