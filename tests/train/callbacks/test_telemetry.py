"""Router load, underused experts, peak memory and checkpoint stalls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import ONE_RANK
from toy_packs import make_toy_pack

from onellm_dist.config.schema import TrackSection
from onellm_dist.model.presets import load_model
from onellm_dist.train.callbacks.experts import Experts, RouterWatch, UnderuseDetector
from onellm_dist.train.callbacks.telemetry import Telemetry, peak_memory
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.metrics import MetricSet
from onellm_dist.train.totals import StepTotals


def read_events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def test_an_expert_that_no_modality_uses_for_long_is_found() -> None:
    detector = UnderuseDetector(0.1, 20)
    busy = {"a": [0.5, 0.05, 0.45], "b": [0.4, 0.2, 0.4]}
    idle = {"a": [0.5, 0.05, 0.45], "b": [0.5, 0.09, 0.41]}
    assert [detector.update(step, busy) for step in range(0, 100, 10)] == [[]] * 10
    assert [detector.update(step, idle) for step in range(100, 140, 10)] == [[], [], [1], []]
    assert detector.update(140, busy) == []
    assert [detector.update(step, idle) for step in range(150, 180, 10)] == [[], [], [1]], (
        "found again after it recovered"
    )


def test_router_load_is_the_mean_router_weight_and_underuse_is_an_event(tmp_path: Path) -> None:
    model, _ = load_model(path=None, preset="toy", seed=0)
    watch = RouterWatch(model, {"image", "imu"})
    assert watch.read() == {}
    out = model(packed=make_toy_pack(["image", "audio"], 5))
    load = watch.read()
    assert set(load) == {"image", "imu"}
    assert load["image"] == pytest.approx(out.router_weights["image"].mean(0).tolist())
    assert sum(load["imu"]) == pytest.approx(1, abs=1e-5)

    track = TrackSection(underused_expert_share=0.9, underused_expert_steps=4)
    events = Events(tmp_path, enabled=True)
    experts = Experts(watch, track=track, log_every=2, steps=9, events=events)
    assert experts.metrics_to_record(0) == {}, "at the log interval alone"
    assert experts.metrics_to_record(1) == {"router_load": load}
    for step in range(2, 9):
        experts.metrics_to_record(step)
    underused = read_events(tmp_path, "expert_underused")
    assert [event["expert"] for event in underused] == [0, 1, 2]
    assert set(underused[0]["load"]) == {"image", "imu"}


def test_peak_memory_is_reduced_at_the_log_interval_and_stalls_are_recorded_once() -> None:
    telemetry = Telemetry(torch.device("cpu"), log_every=2, steps=9)
    telemetry.on_checkpoint(0, 1.0)
    telemetry.on_checkpoint(0, 0.5)
    assert telemetry.metrics_to_reduce(0) == {}
    assert telemetry.metrics_to_record(0) == {"checkpoint_stall_seconds": 1.5}
    own = telemetry.metrics_to_reduce(1)
    assert own["peak_memory_bytes"] >= 100 << 20
    assert telemetry.metrics_to_record(1) == {"checkpoint_stall_seconds": 0.0}
    totals = StepTotals([], ONE_RANK, MetricSet().reduced)
    totals.reduce(metrics=own)
    assert totals.read().metrics == own
    assert telemetry.metrics_to_reduce(8), "after the last step too"


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory(torch.device("cpu"))
    torch.zeros(80 << 20).add_(1)  # 320 MiB, touched
    after = peak_memory(torch.device("cpu"))
    assert after >= before and after > 320 << 20
