"""Weights & Biases, MLflow, Aim ... beside TensorBoard: accelerate's trackers (seen with 1.15), on rank 0 alone.

A tracker that fails while the run goes on is dropped with an event: a figure on a web page is not worth a step.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import TrackSection
from onellm_dist.train.records.metrics import Events

FOLDER = "trackers"
_PACKAGES = {"comet_ml": "comet-ml"}


def tracker_class(name: str) -> Any:
    """The class of a tracker: by accelerate's name for it, or `module:Class` for one of your own (a GeneralTracker).

    Raises:
        UsageError: nothing is called so, or its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

    if ":" in name:
        return _own_class(name, GeneralTracker)
    if name not in LOGGER_TYPE_TO_CLASS:
        near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
        raise UsageError(
            f"track.with: no tracker is called {name!r}"
            + (f"; did you mean {near[0]}?" if near else ""),
            "the run's figures would not arrive there.",
            f"name some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, or module:Class of your own.",
        )
    builtin = LOGGER_TYPE_TO_CLASS[name].__module__ == GeneralTracker.__module__
    if builtin and name not in [str(kind) for kind in get_available_trackers()]:
        raise UsageError(
            f"track.with: the package of {name} is not installed",
            "the run's figures would not arrive there.",
            f"pip install {_PACKAGES.get(name, name)}, or take {name} out of track.with.",
        )
    return LOGGER_TYPE_TO_CLASS[name]


def _own_class(name: str, base: type) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"track.with: {name} cannot be imported: {error}",
            "the run's figures would not arrive there.",
            "check PYTHONPATH.",
        ) from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(
            f"track.with: {name} is no accelerate.tracking.GeneralTracker",
            "it has no log().",
            "derive it from that class.",
        )
    return found


def check_trackers(track: TrackSection) -> None:
    """Refuse what cannot be tracked with, before anything starts.

    Raises:
        UsageError: see `tracker_class`.
    """
    for name in track.trackers:
        tracker_class(name)


class Trackers:
    """The trackers of a run. Rank 0 makes it and calls it.

    Args:
        config: the resolved recipe, stored by each tracker as the run's parameters.
    """

    def __init__(
        self, track: TrackSection, run_dir: Path, config: Mapping[str, Any], events: Events
    ) -> None:
        self._events = events
        self._open: dict[str, Any] = {}
        for name in track.trackers:
            kind = tracker_class(name)
            folder = [str(run_dir / FOLDER)] if kind.requires_logging_directory else []
            tracker = kind(track.project, *folder, **dict(track.options.get(name, {})))
            # Rank 0 alone comes here. Left on, each call would make accelerate's PartialState, which sets this process's threads.
            tracker.main_process_only = False
            self._open[name] = tracker
        for name in list(self._open):
            self._try(name, "start")
            self._try(name, "store_init_configuration", _flat(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures of a step."""
        for name in list(self._open):
            self._try(name, "log", dict(values), step=step)

    def finish(self) -> None:
        """The run is over."""
        for name in list(self._open):
            self._try(name, "finish")

    def _try(self, name: str, call: str, *arguments: Any, **options: Any) -> None:
        tracker = self._open.get(name)
        if tracker is None:
            return
        try:
            getattr(tracker, call)(*arguments, **options)
        except Exception as error:  # of a foreign service: a lost network, a full account
            del self._open[name]
            problem = f"{type(error).__name__}: {error}"
            self._events.write(
                "tracker_dropped",
                tracker=name,
                call=call,
                problem=problem,
                say=f"WARNING: tracker {name}: {problem}",
            )


def _flat(config: Mapping[str, Any], before: Sequence[str] = ()) -> dict[str, Any]:
    """`{"train": {"steps": 3}}` -> `{"train.steps": 3}`; what is no scalar is written as text."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = [*before, str(key)]
        if isinstance(value, Mapping):
            found |= _flat(value, path)
        else:
            found[".".join(path)] = (
                value if isinstance(value, (bool, int, float, str)) else str(value)
            )
    return found
