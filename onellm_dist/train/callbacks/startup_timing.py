"""Start-up timing: how long a start took until its first step was done, by part.

Events `startup_timing` with `name` and `seconds`, one per part and start. What lies between two
parts (locks, the run directory) counts to the part it stands in; a part may come in pieces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.heartbeat import Heartbeat
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.metrics import StepMetrics

PARTS = ("imports", "process_group", "model", "engine", "checkpoint", "data", "first_step")
"""The parts of a start: imports (since the process began), process group, model, engine,
checkpoint, data (plan, token counts, loader), and the first step."""


class StartupTiming(Callback):
    """Measures the parts of this start.

    Args:
        heartbeat: learns when a part begins, so that the watchdog knows.
    """

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        self._heartbeat = heartbeat
        self.seconds: dict[str, float] = {}
        self._written = False

    def add(self, part: str, seconds: float) -> None:
        """Count `seconds` to `part`.

        Raises:
            ValueError: there is no such part.
        """
        if part not in PARTS:
            raise ValueError(f"{part} is not a part of a start")
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time of the context to `part`."""
        started = time.perf_counter()
        if self._heartbeat is not None:
            self._heartbeat.leave_step(part)
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - started)

    def measure_imports(self) -> None:
        """Count everything since the process began to `imports`."""
        self.add("imports", max(0.0, time.time() - psutil.Process().create_time()))

    def on_metrics(self, metrics: StepMetrics) -> None:
        self.write(metrics.seconds, metrics.data_wait_seconds, self.trainer.events)

    def write(self, seconds: float, data_wait_seconds: float, events: Events) -> None:
        """Write the events after the first step; later calls do nothing.

        Args:
            seconds: duration of the step.
            data_wait_seconds: time of it that went into waiting for the loader.
            events: where they go.
        """
        if self._written:
            return
        self._written = True
        self.add("data", data_wait_seconds)
        self.add("first_step", seconds - data_wait_seconds)
        for part in PARTS:
            events.write("startup_timing", name=part, seconds=round(self.seconds.get(part, 0.0), 3))
