"""Training from Python: two runs in one process, which continues; callbacks and metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_onellm import get_small_model

from onellm_dist.shards.sources.toyworld.build import build_toyworld
from onellm_dist.train.records.metrics import METRICS

pytestmark = pytest.mark.slow

CALLBACKS = '''
"""Callbacks of another package: metrics with and without a reduction, and every hook."""

from onellm_dist import Callback, Metric


class Thermometer(Callback):
    metrics = (
        Metric("temperature", "Warmest rank.", unit="K", reduction="max", charted=True),
        Metric("ranks", "Ranks that answered.", "integer", reduction="sum"),
        Metric("parity", "Whether the step is odd.", "boolean"),
        Metric("mean_tokens", "Text tokens per micro-batch.", reduction="mean"),
    )

    def metrics_to_reduce(self, step):
        return {"temperature": 300.0 + step, "ranks": 1}

    def metrics_to_record(self, step):
        return {"parity": bool(step % 2)}

    def after_forward_backward(self, step):
        self.trainer.record_metric("mean_tokens", 7.0)


class Failing(Callback):
    def on_step_end(self, step):
        raise OSError("no paper left")


class Diary(Callback):
    def __getattribute__(self, name):
        hook = object.__getattribute__(self, name)
        if name.startswith(("on_", "before_", "after_", "close")):
            trainer = object.__getattribute__(self, "trainer")
            with open(trainer.config.run.dir / "diary", "a") as out:
                out.write(name + "\\n")
        return hook
'''
SCRIPT = """
import os, signal, sys, threading
from pathlib import Path

folder, toy, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path.insert(0, str(folder))

import onellm_dist
assert "torch" not in sys.modules
from onellm_dist import Trainer, load_config

handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
environment = dict(os.environ)
keys = [
    f"data.root={toy}", "train.steps=2", "data.global_batch=4", "data.workers=1",
    "data.mixture=[{path: imu, weight: 1}]", f"model.path={model}", "model.preset=",
]

def train(name, *more):
    config = load_config("toy/align_image", [*keys, f"run.dir={folder / name}", *more])
    return Trainer.from_config(config).fit()

first = train("first")
print("outcome", first.status, first.steps_done, first.exit_code)
second = train("second", "train.callbacks=[others:Thermometer, diary]", "train.log_every=1")
print("outcome", second.status, second.steps_done, second.exit_code)
third = train("third", "engine.name=fsdp", "engine.config=")
print("outcome", third.status, third.steps_done, third.exit_code)
try:
    train("broken", "train.callbacks=[others:Nothing]")
except Exception as error:
    print("refused", type(error).__name__, str(error).splitlines()[0])

try:
    train("failed", "train.callbacks=[others:Failing]")
except OSError as error:
    print("failed", error)

import torch
assert not torch.distributed.is_initialized()
assert {s: signal.getsignal(s) for s in handlers} == handlers
assert dict(os.environ) == environment
assert [t.name for t in threading.enumerate() if t.name in ("watchdog", "checkpoint")] == []
import psutil
assert psutil.Process().children() == [], "loader workers"
print("continues")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of three runs of one process, and what the process printed."""
    folder = tmp_path_factory.mktemp("trainer")
    toy = folder / "toy"
    build_toyworld(toy, seed=0, train_per_modality=12, test_per_modality=2, modalities=("imu",))
    (folder / "others.py").write_text(CALLBACKS)
    info = folder / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[onellm_dist.callbacks]\ndiary = others:Diary\n")
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(toy), str(get_small_model())],
        env=env,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_process_trains_several_times_and_goes_on(trained: tuple[Path, str]) -> None:
    folder, output = trained
    lines = output.splitlines()
    assert lines.count("outcome done 2 0") == 3 and lines[-1] == "continues"
    assert any(
        line.startswith("refused UsageError train.callbacks: others:Nothing") for line in lines
    )
    for name in ("first", "second", "third"):
        assert json.loads((folder / name / "exit.json").read_text())["status"] == "done"
        assert (folder / name / "model" / "model.safetensors").is_file()
    assert json.loads((folder / "broken" / "exit.json").read_text())["status"] == "usage"
    assert "failed no paper left" in lines
    failed = json.loads((folder / "failed" / "exit.json").read_text())
    assert (failed["status"], failed["failed_step"], failed["steps_done"]) == ("failed", 0, 0)
    assert failed["reason"] == "OSError: no paper left" and failed["offending_samples"]
    end = read_lines(folder / "failed" / "events.jsonl")[-1]
    assert (end["event"], end["status"]) == ("end", "failed")
    losses = [
        [m["loss"] for m in read_lines(folder / n / "metrics.jsonl")] for n in ("first", "second")
    ]
    assert losses[0] == losses[1]


def test_the_work_of_a_step_is_counted_before_the_model_is_sharded(
    trained: tuple[Path, str],
) -> None:
    folder, _ = trained
    formulas = [
        next(e["mfu"] for e in read_lines(folder / n / "events.jsonl") if e["event"] == "start")
        for n in ("first", "third")
    ]
    assert formulas[0] == formulas[1], "ZeRO-3 and FSDP2"
    assert " = 4.1e+04 per LLM position (4 N)" in formulas[0], "N: 10,240 weights of one block"


def test_a_metric_and_a_callback_cost_one_file(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    own = [metric.name for metric in METRICS]
    first = read_lines(folder / "first" / "metrics.jsonl")
    second = read_lines(folder / "second" / "metrics.jsonl")
    assert list(first[0]) == own
    assert list(second[0]) == [*own, "temperature", "ranks", "parity", "mean_tokens"]
    assert [m["temperature"] for m in second] == [300.0, 301.0]
    assert [(m["ranks"], m["parity"], m["mean_tokens"]) for m in second] == [
        (1.0, False, 7.0),
        (1.0, True, 7.0),
    ]


def test_the_hooks_are_called_in_their_order(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    step = [
        "on_step_start",
        "before_forward_backward",
        "after_forward_backward",
        "on_metrics",
        "on_step_end",
        "after_step",
    ]
    assert (folder / "second" / "diary").read_text().split() == [
        "on_fit_start",
        "before_first_step",
        *step,
        *step,
        "on_checkpoint",
        "on_fit_end",
        "close",
    ]
