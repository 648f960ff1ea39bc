"""A profile of some steps: a Chrome trace, and on a GPU a snapshot of its memory, of rank 0.

The recipe asks for it (`track.profile_steps=[10, 12]`: both included), or, during a run, a file
`profile` in the run directory (`touch RUN_DIR/profile`; a number in it says how many steps).
Profiled steps are slower; their numbers are the same.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.run_files import PROFILE, PROFILES
from onellm_dist.config.schema import TrackSection
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.records.events import Events

DEFAULT_STEPS = 2
"""Steps that an empty request file asks for."""
SNAPSHOT_EVENTS = 200_000
"""Allocations that a memory snapshot remembers."""


class Profiler(Callback):
    """Profiles the requested steps; otherwise it only looks for the request file before each step.

    Args:
        track: the `track` section.
        run_dir: the run directory.
        device: this rank's device.
        events: where a finished profile is recorded.
        enabled: whether this process profiles; false on every rank but rank 0.
    """

    def __init__(
        self,
        track: TrackSection,
        run_dir: Path,
        device: torch.device,
        events: Events,
        *,
        enabled: bool,
    ) -> None:
        self._wanted = track.profile_steps if enabled else None
        self._request = run_dir / PROFILE if enabled else None
        self._folder = run_dir / PROFILES
        self._device = device
        self._events = events
        self._running: Any = None
        self._first = -1
        self._last = -1

    def on_step_start(self, step: int) -> None:
        if self._running is not None or self._request is None:
            return
        if self._wanted is not None and self._wanted[0] <= step <= self._wanted[1]:
            self._start(step, self._wanted[1])
        elif self._request.exists():
            self._start(step, step + self._read_request() - 1)

    def on_step_end(self, step: int) -> None:
        if self._running is None or step < self._last:
            return
        running = self._running
        self._running = None
        name = f"steps-{self._first:08d}-{step:08d}"
        written = []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            written.append(self._folder / f"{name}.memory.pickle")
            torch.cuda.memory._dump_snapshot(str(written[-1]))
            torch.cuda.memory._record_memory_history(enabled=None)
        running.__exit__(None, None, None)
        written.append(self._folder / f"{name}.trace.json.gz")
        running.export_chrome_trace(str(written[-1]))
        files = [str(path) for path in written]
        self._events.write(
            "profile",
            first=self._first,
            last=step,
            files=files,
            message=f"profile of steps {self._first} to {step}: {files[-1]}",
        )

    def _start(self, first: int, last: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._folder.mkdir(exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
        self._first = first
        self._last = last
        self._running = profile(activities=activities, profile_memory=True, record_shapes=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Kineto finds missing on a machine without a GPU
            self._running.__enter__()

    def _read_request(self) -> int:
        """The number of steps in the request file, which is removed."""
        assert self._request is not None
        text = ""
        with contextlib.suppress(OSError):
            text = self._request.read_text(encoding="utf-8").strip()
        self._request.unlink(missing_ok=True)
        return max(1, int(text)) if text.isdigit() else DEFAULT_STEPS
