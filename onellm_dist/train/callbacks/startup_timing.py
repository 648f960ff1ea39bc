"""How long a start took until its first step was done, by phase: events `phase` with `name` and `seconds`, one each a start.

`imports` (from the start of the process), `process_group`, `model`, `engine`, `checkpoint`, `data` (plan, length sidecars, loader),
`first_step`. What lies between them (locks, the run directory) counts to the phase it stands in; a phase may come in parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from onellm_dist.train.heartbeat import InFlight
from onellm_dist.train.records.metrics import Events

NAMES = ("imports", "process_group", "model", "engine", "checkpoint", "data", "first_step")


class Phases:
    """The seconds of each phase of this start.

    Args:
        in_flight: is told when a phase begins, so that the watchdog knows.
    """

    def __init__(self, in_flight: InFlight | None = None) -> None:
        self._in_flight = in_flight
        self.seconds: dict[str, float] = {}
        self._told = False

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` to `name`, one of NAMES."""
        if name not in NAMES:
            raise ValueError(f"{name} is no phase of a start")
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what is done inside to `name`."""
        started = time.perf_counter()
        if self._in_flight is not None:
            self._in_flight.rest(name)
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def imported(self) -> None:
        """The imports are done: everything since the process began was that."""
        self.add("imports", max(0.0, time.time() - psutil.Process().create_time()))

    def first_step(self, seconds: float, waited: float, events: Events) -> None:
        """A step is done, which took `seconds`, `waited` of them for the loader. The first one ends the start: the events are written."""
        if self._told:
            return
        self._told = True
        self.add("data", waited)
        self.add("first_step", seconds - waited)
        for name in NAMES:
            events.write("phase", name=name, seconds=round(self.seconds.get(name, 0.0), 3))
