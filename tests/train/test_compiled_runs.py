"""A real run of `train.compile=blocks`: the same losses, and its start says what is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_onellm import get_small_keys
from toy_runs import Runs
from zygote import get_zygote

from onellm_dist.train.records.json_lines import read_lines

KEYS: dict[str, Any] = {
    "engine__config": "zero2",
    "train__kernels": "fused",
    "train__steps": 2,
    "data__global_batch": 4,
    "data__validation": "{split: test_seen, samples: 4, every: 1}",
    "launch__ranks": 1,
}


@pytest.mark.slow
def test_a_compiled_run_trains_and_validates_as_one_that_is_not(tmp_path: Path) -> None:
    runs = Runs(tmp_path, ("image", "imu"), 8, **get_small_keys())
    for name, keys in (("plain", {}), ("compiled", {"train__compile": "blocks"})):
        overrides = runs.overrides(name, **KEYS, **keys)
        get_zygote().start(1, overrides, {"no_inductor": True}).done()
    kernels = {}
    for name in ("plain", "compiled"):
        events = read_lines(runs.root / name / "events.jsonl")
        (kernels[name],) = (line["kernels"] for line in events if line["event"] == "start")
        assert kernels[name]["choice"] == "fused" and kernels[name]["modules"]["rotary"] == 1
    assert "compiled" not in kernels["plain"]
    assert kernels["compiled"]["compiled"] == {
        "EncoderBlock": 1,
        "UPMBlock": 2 * 1,
        "LlamaDecoderLayer": 1,
    }
    for file, key in (("metrics.jsonl", "step"), ("validation.jsonl", "steps_done")):
        plain, compiled = (runs.metrics(name, file, key) for name in ("plain", "compiled"))
        assert len(plain) == len(compiled) == 2
        for place, line in plain.items():
            assert compiled[place]["loss"] == pytest.approx(line["loss"], rel=1e-5), place
