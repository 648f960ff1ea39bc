"""Trackers beside TensorBoard, and what they receive."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from accelerate.tracking import GeneralTracker

from onellm_dist.common.errors import UsageError
from onellm_dist.config.load import load_config
from onellm_dist.config.schema import RunConfig, TrackSection
from onellm_dist.train.callbacks.metrics import MetricsWriter
from onellm_dist.train.callbacks.trackers import Trackers, check_trackers, tracker_class
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.metrics import MetricSet, StepMetrics

METRICS = MetricSet()


class LineTracker(GeneralTracker):  # type: ignore[misc]  # accelerate is not typed
    """Writes what it receives, a JSON object per line, as an offline tracker of a user's own."""

    name = "lines"
    requires_logging_directory = True
    fails_at: ClassVar[int | None] = None

    def __init__(self, project: str, folder: str, tag: str = "") -> None:
        super().__init__()
        self.path = Path(folder) / f"{project}{tag}.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    def _add(self, **line: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def start(self) -> None:
        self._add(call="start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._add(call="config", values=values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route")
        self._add(call="log", step=step, values=values)

    def finish(self) -> None:
        self._add(call="finish")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_metrics(step: int, **fields: Any) -> StepMetrics:
    metrics = StepMetrics(METRICS, step)
    metrics.seconds = 2.0
    given = {
        "loss": 2.0,
        "loss_by_modality": {"image": 2.0},
        "lr": 1e-3,
        "grad_norm": 1.0,
        "applied": True,
        "samples": 4,
        "global_valid_tokens": 9,
        "tokens": 100,
        "padding_fraction": 0.0,
        "tokens_per_second": 50.0,
        "data_wait_fraction": 0.1,
        "mfu": None,
        "sample_digest": "",
        "seconds": 2.0,
        "pack_balance": 1.0,
    }
    for name, value in {**given, **fields}.items():
        metrics.record(name, value)
    return metrics


@pytest.fixture
def own_tracker(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(
        sys.modules, "my_trackers", SimpleNamespace(LineTracker=LineTracker, Other=dict)
    )
    monkeypatch.setattr(LineTracker, "fails_at", None)
    return "my_trackers:LineTracker"


def test_trackers_receive_the_recipe_and_every_metric(tmp_path: Path, own_tracker: str) -> None:
    track = TrackSection.model_validate(
        {"with": [own_tracker], "project": "p", "options": {own_tracker: {"tag": "-x"}}}
    )
    recipe = {"train": {"steps": 3, "stage": "align"}, "data": {"mixture": [1, 2]}}
    trackers = Trackers(track, tmp_path, recipe, Events(tmp_path, enabled=True))
    writer = MetricsWriter(tmp_path, enabled=True, steps=2, log_every=1)
    writer.open(0)
    norms, load = {"image": 0.6, "upm": 0.8}, {"image": [0.2, 0.3, 0.5]}
    first = make_metrics(
        0, grad_norm_by_part=norms, router_load=load, peak_memory_bytes=7, pack_balance=1.25
    )
    for metrics in (first, make_metrics(1, grad_norm=float("nan"))):
        writer.on_metrics(metrics)
        trackers.on_metrics(metrics)
    writer.close()
    trackers.on_fit_end(None)
    received = read_lines(tmp_path / "trackers" / "p-x.jsonl")
    assert [line["call"] for line in received] == ["start", "config", "log", "log", "finish"]
    assert received[1]["values"] == {
        "train.steps": 3,
        "train.stage": "align",
        "data.mixture": "[1, 2]",
    }
    values = received[2]["values"]
    assert (
        values["train/loss"] == 2.0
        and values["loss_by_modality/image"] == 2.0
        and values["grad_norm_by_part/upm"] == 0.8
    )
    assert (
        values["router_load/image/expert2"] == 0.5
        and values["train/pack_balance"] == 1.25
        and "train/mfu" not in values
    )
    assert received[3]["step"] == 1 and "train/grad_norm" not in received[3]["values"], (
        "what is not finite is left out"
    )
    written = read_lines(tmp_path / "metrics.jsonl")
    assert METRICS.build_charts(written[0]) == values
    assert written[1]["router_load"] is None and written[1]["grad_norm"] is None


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(
    tmp_path: Path, own_tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LineTracker, "fails_at", 1)
    track = TrackSection.model_validate({"with": [own_tracker]})
    trackers = Trackers(track, tmp_path, {}, Events(tmp_path, enabled=True))
    for step in range(3):
        trackers.log({"loss": 1.0}, step)
    trackers.close()
    received = read_lines(tmp_path / "trackers" / "onellm.jsonl")
    assert [line["call"] for line in received] == ["start", "config", "log"]
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["tracker"], event["call"]) == (
        "tracker_dropped",
        own_tracker,
        "log",
    ) and "no route" in event["problem"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "did you mean wandb"),
        ("my_trackers:Nothing", "cannot be imported"),
        ("no_such_module:X", "cannot be imported"),
        ("my_trackers:Other", r"is not a subclass of accelerate\.tracking\.GeneralTracker"),
    ],
)
def test_trackers_that_do_not_exist_are_refused(own_tracker: str, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_trackers(TrackSection.model_validate({"with": [name]}))


def test_a_tracker_whose_package_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(UsageError, match="pip install comet-ml"):
        check_trackers(TrackSection.model_validate({"with": ["comet_ml"]}))
    monkeypatch.undo()
    assert tracker_class("tensorboard").name == "tensorboard"


def load_recipe(tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {preset: toy}\ndata: {mixture: [{path: image}], global_batch: 1}\n"
        "train: {stage: align, steps: 9}\noptim: {lr: 1.0}\n"
    )
    return load_config(path, overrides)


def test_the_keys_of_tracking_are_read_and_written_back(tmp_path: Path) -> None:
    config = load_recipe(tmp_path, "track.with=[wandb]", "track.profile_steps=[10,12]")
    assert config.track.trackers == ("wandb",) and config.track.profile_steps == (10, 12)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert "with:" in config.to_yaml()
    assert load_config(resolved) == config
    with pytest.raises(UsageError, match=r"did you mean track\.with"):
        load_recipe(tmp_path, "track.wiht=[wandb]")
