"""What the planner says of a run beside what was measured, where its device has constants."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pydantic import ValidationError

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.html.page import build_html_table
from onellm_dist.config.schema import RunConfig
from onellm_dist.report.entries import Entry, to_number
from onellm_dist.report.records import RunRecords
from onellm_dist.report.starts import Start

GIGA = 1e9
NOTE = (
    "Steps are compared by their median, without the first one. Memory is what torch allocates on "
    "a GPU, and resident memory on processors. The predicted MFU counts attention, the measured "
    "one does not."
)


@dataclass(frozen=True)
class PredictedFigure:
    """One figure, as it was predicted and as it was measured."""

    name: str
    unit: str
    predicted: float
    measured: float | None
    """None: the run has not recorded it."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted if self.measured and self.predicted else None


@dataclass(frozen=True)
class Prediction:
    """The latest start that trained, as the planner sees it."""

    device: str
    """Number of ranks, and what they run on."""
    constants: str
    """Date of the device's constants, and whether they were measured."""
    figures: tuple[PredictedFigure, ...] = ()
    problem: str = ""
    """Why nothing is predicted."""

    def to_json(self) -> dict[str, Any]:
        """The figures, in seconds, bytes and shares."""
        figures = [{**vars(figure), "ratio": figure.ratio} for figure in self.figures]
        return {**vars(self), "figures": figures}


def build_prediction(records: RunRecords, starts: Sequence[Start]) -> Prediction | None:
    """Plan the run as its latest start trained it; None where its device has no constants.

    Args:
        records: the files of the run; its resolved recipe is planned.
        starts: its starts.
    """
    start = next((s for s in reversed(starts) if len(s.steps) > 1 and s.device_name), None)
    if start is None:
        return None
    from onellm_dist.planner.hardware import find_kind

    try:
        kind = find_kind(start.device_name)
    except OneLLMError:  # a damaged file of constants: `onellm plan` says so
        return None
    if kind is None:
        return None
    device = f"{start.world_size} x {start.device_name}"
    constants = f"{kind.kind}, {kind.date}, {'measured' if kind.measured else 'not measured'}"
    try:
        return Prediction(device, constants, _predict(records.config, start, kind))
    except OneLLMError as error:
        problem = error.what.splitlines()[0].rstrip(".")
    except ValidationError:
        problem = "config.yaml is not a complete recipe"
    except ImportError as error:  # the rest of the report needs no torch
        problem = str(error)
    return Prediction(device, constants, problem=problem)


def _predict(config: Entry, start: Start, kind: Any) -> tuple[PredictedFigure, ...]:
    from onellm_dist.planner.command import PlanOptions, make_config_planner

    recipe = {key: value for key, value in config.items() if key in RunConfig.model_fields}
    nodes = start.nodes or 1
    options = PlanOptions(
        gpu=kind.kind, nodes=nodes, gpus_per_node=max(1, start.world_size // nodes)
    )
    plan = make_config_planner(RunConfig.model_validate(recipe), options).plan()
    steps = start.steps[1:]
    seconds = [to_number(s.get("seconds")) for s in steps if to_number(s.get("seconds")) > 0]
    rates = [
        to_number(s.get("samples")) / to_number(s.get("seconds"))
        for s in steps
        if to_number(s.get("seconds")) > 0 and s.get("samples")
    ]
    memory = plan.memory
    peak = memory.total - memory.fragmentation - (0.0 if kind.shared else memory.context)
    peaks = [to_number(s.get("peak_memory_bytes")) for s in start.steps]
    mfu = [to_number(s["mfu"]) for s in steps if s.get("mfu") is not None]
    return (
        PredictedFigure("samples/s", "", plan.samples_per_second, _median(rates)),
        PredictedFigure("seconds a step", "s", plan.time.total, _median(seconds)),
        PredictedFigure("peak memory of a rank", "B", peak, max(peaks, default=0.0) or None),
        PredictedFigure("MFU", "share", plan.mfu, _median(mfu)),
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def draw_prediction(prediction: Prediction) -> Iterator[str]:
    """The section of the page."""
    yield "<h2>Predicted and measured</h2>"
    about = f"{prediction.device}; constants: {prediction.constants}."
    if prediction.problem:
        yield f'<p class="none">{escape(about)} Not predicted: {escape(prediction.problem)}.</p>'
        return
    rows = make_prediction_rows(prediction)
    table = build_html_table(rows[0], rows[1:], right=(1, 2, 3))
    yield f'<div class="narrow">{table}</div>'
    yield f'<p class="small">{escape(f"{about} {NOTE}")}</p>'


def make_prediction_rows(prediction: Prediction) -> list[tuple[str, ...]]:
    """A header, and a row for each figure."""
    rows: list[tuple[str, ...]] = [("", "predicted", "measured", "measured / predicted")]
    for figure in prediction.figures:
        ratio = "–" if figure.ratio is None else f"{figure.ratio:.2f}"
        measured = "–" if figure.measured is None else _format(figure.measured, figure.unit)
        rows.append((figure.name, _format(figure.predicted, figure.unit), measured, ratio))
    return rows


def _format(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / GIGA:.2f} GB"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:.3g} {unit}".rstrip()
