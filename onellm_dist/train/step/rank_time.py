"""Where the time of a rank goes in a step: data, compute, or anything else on the host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from onellm_dist.train.step.forward_clock import ForwardClock

EVERY = 4
"""Steps between two measurements: the hooks of a measured step cost a few milliseconds."""


class RankTime:
    """Measures this rank in every `EVERY`-th step.

    Args:
        model: the model inside the engine.
        device: where it computes.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._clock = ForwardClock(model, device)
        self._stack = ExitStack()
        self._measured = False
        self._started = 0.0
        self._passes = 0.0
        self._data_steps = 0
        self._data_total = 0.0

    def begin(self, step: int) -> None:
        """The micro-batches of a step are about to run."""
        self._stack.close()  # a step that failed left its hooks
        self._measured = step % EVERY == EVERY - 1
        self._started = time.perf_counter()
        self._passes = 0.0
        if self._measured:
            self._stack.enter_context(self._clock.measure())

    @contextmanager
    def run_forward(self) -> Iterator[None]:
        """A forward pass runs, with the engine's collectives."""
        with self.run_pass(), self._clock.run() if self._measured else ExitStack():
            yield

    @contextmanager
    def run_pass(self) -> Iterator[None]:
        """A forward or backward pass runs, with the engine's collectives."""
        started = time.perf_counter()
        yield
        self._passes += time.perf_counter() - started

    def end(self, data_wait: float) -> Mapping[str, float]:
        """The micro-batches have run, and the ranks are about to meet.

        Args:
            data_wait: seconds of the step in which this rank waited for its loader.

        Returns:
            Seconds of this rank alone for `data`, `compute` (its forward) and `host` (everything
            else); {} in a step that is not measured. `data` is the mean since the last measured
            step, as loaders stall now and then.
        """
        self._data_steps += 1
        self._data_total += data_wait
        if not self._measured:
            return {}
        self._stack.close()
        host = time.perf_counter() - self._started - data_wait - self._passes
        data, steps = self._data_total, self._data_steps
        self._data_steps = 0
        self._data_total = 0.0
        return {"data": data / steps, "compute": self._read_compute(), "host": max(0.0, host)}

    def _read_compute(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # in one step of four, just before the ranks meet
        return self._clock.read()
