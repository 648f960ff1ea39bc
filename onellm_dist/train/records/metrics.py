"""The metrics of a step: each name with type, unit, meaning and reduction; and `metrics.jsonl`.

A metric is written down once, in `METRICS` or in the `metrics` of a callback. The fields of
the file, the charts and the reference page follow from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onellm_dist.common.run_files import METRICS as METRICS_FILE
from onellm_dist.train.records.json_lines import to_json
from onellm_dist.train.records.patient_file import PatientFile

MetricType = Literal["integer", "number", "boolean", "text", "map", "map of lists"]
Reduction = Literal["none", "sum", "mean", "max"]


@dataclass(frozen=True)
class Metric:
    """One metric of a step.

    Attributes:
        name: field of `metrics.jsonl`.
        meaning: what it says, for the reference.
        type: its JSON type; a `map` has a number per modality, part or the like.
        unit: its unit; "" where it has none.
        reduction: how the values of the ranks become one. `sum`, `mean` and `max` take part in the
            step's one reduction; `none`: every rank has the same value, or rank 0's counts.
        charted: whether TensorBoard and trackers show it.
    """

    name: str
    meaning: str
    type: MetricType = "number"
    unit: str = ""
    reduction: Reduction = "none"
    charted: bool = False


METRICS: tuple[Metric, ...] = (
    Metric("step", "Index of the optimizer step; the first is 0.", "integer"),
    Metric(
        "loss",
        "Cross-entropy of the step: the weighted sum over supervised tokens divided by "
        "`global_valid_tokens`. With `train.loss: dpo`, the mean loss of a pair.",
        unit="nats per token",
        charted=True,
    ),
    Metric(
        "loss_by_modality",
        "Mean cross-entropy (of pairs, mean loss) by modality combination (`image`, "
        "`video+audio`, `text`); skipped samples do not count.",
        "map",
        "nats per token",
        charted=True,
    ),
    Metric("lr", "Learning rate of the step.", charted=True),
    Metric(
        "grad_norm",
        "Norm of the gradient before clipping; null where it is not finite.",
        charted=True,
    ),
    Metric(
        "applied",
        "Whether the step was applied; false where loss or gradient was not finite, or a spike.",
        "boolean",
    ),
    Metric("samples", "Samples of the global batch.", "integer", "samples"),
    Metric(
        "global_valid_tokens",
        "Supervised tokens of the global batch by the plan, at least 1; the loss of tokens is "
        "divided by it.",
        "integer",
        "tokens",
    ),
    Metric(
        "tokens",
        "LLM positions of all ranks, media spans included.",
        "integer",
        "tokens",
    ),
    Metric(
        "padding_fraction",
        "Share of positions that belong to no sample (empty micro-batches).",
        charted=True,
    ),
    Metric("tokens_per_second", "LLM positions of all ranks per second.", unit="1/s", charted=True),
    Metric(
        "data_wait_fraction",
        "Share of the step in which rank 0 waited for the loader.",
        charted=True,
    ),
    Metric(
        "mfu",
        "Model FLOPs utilisation (see `step/flops.py`); null where the device's peak is unknown.",
        charted=True,
    ),
    Metric(
        "sample_digest",
        "SHA-256 of the step's sample ids; equal for any number of ranks.",
        "text",
    ),
    Metric("seconds", "Duration of the step on rank 0.", unit="s", charted=True),
    Metric(
        "pack_balance",
        "Predicted cost of the most expensive micro-batch divided by the mean over all ranks.",
        charted=True,
    ),
    Metric(
        "grad_norm_by_part",
        "Gradient norm of each modality's own parameters, of the encoder (`encoder`), of the UPM "
        "(`upm`) and of the LLM (`llm`), as far as they train.",
        "map",
        charted=True,
    ),
    Metric(
        "router_load",
        "Mean router weight of each expert, by modality; at the log interval, else null.",
        "map of lists",
        charted=True,
    ),
    Metric(
        "rewards_chosen",
        "Mean reward of the chosen answers: beta times the log-probability less the reference's; "
        "null without preference pairs, as the other rewards.",
        unit="nats",
        charted=True,
    ),
    Metric("rewards_rejected", "Mean reward of the rejected answers.", unit="nats", charted=True),
    Metric(
        "rewards_margin",
        "Mean reward of the chosen answer less that of the rejected one.",
        unit="nats",
        charted=True,
    ),
    Metric(
        "rewards_accuracy",
        "Share of pairs whose chosen answer has the higher reward.",
        charted=True,
    ),
    Metric(
        "peak_memory_bytes",
        "Largest amount of memory that a rank has held so far (GPU memory; resident memory on a "
        "CPU); at the log interval, else null.",
        "integer",
        "bytes",
        reduction="max",
        charted=True,
    ),
    Metric(
        "checkpoint_stall_seconds",
        "Time between the previous step and this one in which training waited for a checkpoint.",
        unit="s",
        charted=True,
    ),
)
"""Every metric of the package, in the order of the file."""


class MetricSet:
    """The metrics of a run: those of the package, and those that its callbacks add.

    Args:
        metrics: the first of them.
    """

    def __init__(self, metrics: Iterable[Metric] = METRICS) -> None:
        self._metrics: dict[str, Metric] = {}
        self.add(metrics)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._metrics.values())

    def __getitem__(self, name: str) -> Metric:
        if name not in self._metrics:
            raise KeyError(
                f"{name} is not a metric: declare it in `METRICS` or in a callback's `metrics`"
            )
        return self._metrics[name]

    def add(self, metrics: Iterable[Metric]) -> None:
        """Add metrics.

        Raises:
            ValueError: another metric has the name already.
        """
        for metric in metrics:
            if self._metrics.setdefault(metric.name, metric) != metric:
                raise ValueError(f"two metrics are named {metric.name}")

    @property
    def reduced(self) -> list[Metric]:
        """Metrics that take part in the reduction over ranks."""
        return [metric for metric in self if metric.reduction != "none"]

    def build_line(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A line of `metrics.jsonl`: every metric in order, null where there is no value."""
        return {metric.name: to_json(values.get(metric.name)) for metric in self}

    def build_charts(self, line: Mapping[str, Any]) -> dict[str, float]:
        """The numbers of a line by the names under which TensorBoard and trackers show them."""
        scalars: dict[str, float] = {}
        for metric in self:
            value = line.get(metric.name)
            if not metric.charted or value is None or isinstance(value, str):
                continue
            if isinstance(value, Mapping):
                scalars |= _chart_map(metric.name, value)
            else:
                scalars[f"train/{metric.name}"] = value
        return scalars


def _chart_map(name: str, value: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, (list, tuple)):
            found |= {f"{name}/{key}/expert{i}": x for i, x in enumerate(item) if x is not None}
        elif item is not None:
            found[f"{name}/{key}"] = item
    return found


class StepMetrics:
    """The metrics of one step, recorded by name.

    Args:
        known: the metrics of the run.
        step: index of the step.
    """

    def __init__(self, known: MetricSet, step: int) -> None:
        self.step = step
        self.seconds = 0.0
        """Duration of the step on this rank."""
        self.data_wait_seconds = 0.0
        """Time in which this rank waited for its loader."""
        self.rank_seconds: Mapping[str, Sequence[float]] = {}
        """Kind of time to the seconds of each rank (`totals.RANK_SECONDS`), in a measured step."""
        self._known = known
        self._values: dict[str, Any] = {"step": step}

    def record(self, name: str, value: Any) -> None:
        """Record a metric.

        Raises:
            KeyError: no metric has this name.
        """
        self._values[self._known[name].name] = value

    def __getitem__(self, name: str) -> Any:
        return self._values.get(self._known[name].name)

    def build_line(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        return self._known.build_line(self._values)

    def build_charts(self) -> dict[str, float]:
        """The numbers that TensorBoard and trackers show, by name."""
        return self._known.build_charts(self.build_line())


class MetricsFile:
    """Appends to `metrics.jsonl`; lines that the disk has no room for wait.

    Args:
        run_dir: the run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = PatientFile(run_dir / METRICS_FILE)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.append(json.dumps(line) + "\n")
