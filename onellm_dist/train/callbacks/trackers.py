"""Weights & Biases, MLflow, Aim ... beside TensorBoard: accelerate's trackers (1.15), on rank 0.

Each tracker lives in a thread of its own. One that fails, or does not answer for a minute, is
dropped with an event: a number on a web page is not worth a step.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from onellm_dist.common.background import BackgroundCalls
from onellm_dist.common.errors import UsageError
from onellm_dist.common.plugins import import_class
from onellm_dist.common.run_files import TRACKERS
from onellm_dist.config.schema import TrackSection
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.metrics import StepMetrics

PATIENCE_S = 60.0
"""Seconds that a call of a tracker may take."""
WHY = "the metrics of the run would not arrive there."
_PACKAGES = {"comet_ml": "comet-ml"}


def tracker_class(name: str) -> Any:
    """Return the class of a tracker.

    Args:
        name: accelerate's name for it, or `module:Class` of a GeneralTracker of your own.

    Raises:
        UsageError: there is no such tracker, or its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

    if ":" in name:
        return import_class(name, GeneralTracker, key="track.with", why=WHY)
    if name not in LOGGER_TYPE_TO_CLASS:
        near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
        raise UsageError(
            f"track.with: {name!r} is not a tracker"
            + (f"; did you mean {near[0]}?" if near else ""),
            WHY,
            f"use one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, or module:Class of your own.",
        )
    builtin = LOGGER_TYPE_TO_CLASS[name].__module__ == GeneralTracker.__module__
    if builtin and name not in [str(kind) for kind in get_available_trackers()]:
        raise UsageError(
            f"track.with: the package of {name} is not installed",
            WHY,
            f"pip install {_PACKAGES.get(name, name)}, or remove {name} from track.with.",
        )
    return LOGGER_TYPE_TO_CLASS[name]


def check_trackers(track: TrackSection) -> None:
    """Refuse trackers that cannot be used, before anything starts.

    Raises:
        UsageError: see `tracker_class`.
    """
    for name in track.trackers:
        tracker_class(name)


class Trackers(Callback):
    """The trackers of a run.

    Args:
        track: the `track` section.
        run_dir: the run directory.
        config: the resolved recipe, which each tracker stores as the run's parameters.
        events: where a dropped tracker is recorded.
        enabled: whether this process tracks; false on every rank but rank 0.
    """

    def __init__(
        self,
        track: TrackSection,
        run_dir: Path,
        config: Mapping[str, Any],
        events: Events,
        *,
        enabled: bool = True,
    ) -> None:
        self._events = events
        self._open: dict[str, BackgroundCalls] = {}
        self._trackers: dict[str, Any] = {}
        for name in track.trackers if enabled else ():
            self._open[name] = BackgroundCalls(
                f"tracker {name}", partial(self._drop, name), patience=PATIENCE_S
            )
            self._open[name].call("create", self._create, name, track, run_dir)
            self._call(name, "start")
            self._call(name, "store_init_configuration", _flatten(config))

    def _create(self, name: str, track: TrackSection, run_dir: Path) -> None:
        kind = tracker_class(name)
        folder = [str(run_dir / TRACKERS)] if kind.requires_logging_directory else []
        tracker = kind(track.project, *folder, **dict(track.options.get(name, {})))
        # Only rank 0 comes here. Left on, each call would make accelerate's PartialState, which
        # sets this process's threads.
        tracker.main_process_only = False
        self._trackers[name] = tracker

    def on_metrics(self, metrics: StepMetrics) -> None:
        if self._open:
            self.log(metrics.build_charts(), metrics.step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the numbers of a step to every tracker."""
        for name in list(self._open):
            self._call(name, "log", dict(values), step=step)

    def on_fit_end(self, outcome: object) -> None:
        self.close()

    def close(self) -> None:
        for name in list(self._open):
            self._call(name, "finish")
        for calls in list(self._open.values()):
            calls.close()
        self._open.clear()

    def _call(self, name: str, method: str, *arguments: Any, **options: Any) -> None:
        """Let a tracker's thread call a method of it."""
        calls = self._open.get(name)
        if calls is not None:
            calls.call(
                method,
                lambda: getattr(self._trackers[name], method)(*arguments, **options),
            )

    def _drop(self, name: str, call: str, problem: str) -> None:
        self._open.pop(name, None)
        self._events.write(
            "tracker_dropped",
            tracker=name,
            call=call,
            problem=problem,
            message=f"tracker {name} is dropped: {call}: {problem}",
            warning=True,
        )


def _flatten(config: Mapping[str, Any], before: Sequence[str] = ()) -> dict[str, Any]:
    """`{"train": {"steps": 3}}` -> `{"train.steps": 3}`; what is not a scalar becomes text."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = [*before, str(key)]
        if isinstance(value, Mapping):
            found |= _flatten(value, path)
        else:
            scalar = isinstance(value, (bool, int, float, str))
            found[".".join(path)] = value if scalar else str(value)
    return found
