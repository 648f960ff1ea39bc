"""Small runs through a zygote, and comparisons of two of them, for the tests of survival."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from small_onellm import get_small_keys, get_small_model
from zygote import Start, Zygote, get_zygote

from onellm_dist.shards.sources.toyworld.build import build_toyworld
from onellm_dist.train.sample_log.stream import RunStream

STEPS, EVERY, BATCH = 12, 3, 4


class Runs:
    """The toy align run of a small model on IMU: 12 steps, 4 checkpoints, a constant rate.

    Under ZeRO-3, as the recipe, unless `keys` say otherwise. The runs lie in folders of `out`.
    """

    def __init__(self, toy: Path, out: Path, zygote: Zygote, **keys: Any) -> None:
        self.toy, self.out, self.zygote = toy, out, zygote
        self.keys = {**get_small_keys(), **keys}

    def start(
        self, name: str, world_size: int = 2, plant: dict[str, Any] | None = None, **keys: Any
    ) -> Start:
        return self.zygote.start(world_size, self.overrides(name, **keys), plant)

    def overrides(self, name: str, **keys: Any) -> list[str]:
        """The keys of a run, as its command line has them."""
        fixed = {
            "data.root": self.toy,
            "run.dir": self.out / name,
            "train.steps": STEPS,
            "train.log_every": 1,
            "data.global_batch": BATCH,
            "data.workers": 0,
            "data.mixture": "[{path: imu, weight: 1}]",
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.lr": 1e-3,
            "checkpoint.every": EVERY,
            "checkpoint.keep": 20,
        }
        own = {key.replace("__", "."): value for key, value in {**self.keys, **keys}.items()}
        return [f"{key}={value}" for key, value in {**fixed, **own}.items()]

    def done(
        self, name: str, world_size: int = 2, plant: dict[str, Any] | None = None, **keys: Any
    ) -> None:
        self.start(name, world_size, plant, **keys).done()

    def lines(self, name: str, file: str) -> list[dict[str, Any]]:
        """Complete lines of a JSON-lines file of a run."""
        path = self.out / name / file
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            if path.exists()
            else []
        )

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines(name, "events.jsonl") if line["event"] == event]

    def exit(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / name / "exit.json").read_text())
        return found

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.out / name / "checkpoints").glob("step-*"))

    def steps_done(self, name: str) -> int:
        return max((line["step"] + 1 for line in self.lines(name, "metrics.jsonl")), default=0)

    def wait_until(self, start: Start, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not what():
            assert not start.ended and time.monotonic() < deadline, start.output()
            time.sleep(0.005)


def make_runs(toy: Path, out: Path, **keys: Any) -> Runs:
    """Build the toy world of the runs in `toy`; the runs go to `out`, and have `keys`."""
    build_toyworld(toy, seed=0, train_per_modality=64, test_per_modality=4, modalities=("imu",))
    return Runs(toy, out, get_zygote(), **keys)


def find_sample(runs: Runs, reference: str, step: int) -> str:
    """A sample of a step, without its epoch."""
    return RunStream(runs.out / reference).list_samples(step)[1].sample.name


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    with safe_open(run_dir / "model" / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def same_stream(runs: Runs, name: str, reference: str) -> None:
    """Every step once, with the samples that the reference saw."""
    given, wanted = runs.lines(name, "metrics.jsonl"), runs.lines(reference, "metrics.jsonl")
    assert [line["step"] for line in given] == [line["step"] for line in wanted]
    assert [line["sample_digest"] for line in given] == [line["sample_digest"] for line in wanted]


def identical(runs: Runs, name: str, reference: str) -> None:
    """The same stream, losses and weights, bit for bit."""
    same_stream(runs, name, reference)
    for field in ("loss", "grad_norm"):
        values = [
            [line[field] for line in runs.lines(run, "metrics.jsonl")] for run in (name, reference)
        ]
        assert values[0] == values[1], field
    a, b = exported(runs.out / name), exported(runs.out / reference)
    assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []


def update_gap(runs: Runs, name: str, reference: str) -> float:
    """Relative difference of the total update, without weights of zero gradient (key biases)."""
    from onellm_dist.model.presets import load_model

    start = load_model(path=get_small_model(), preset=None, seed=0)[0].state_dict()
    a, b = exported(runs.out / name), exported(runs.out / reference)
    gap = update = 0.0
    for key, value in b.items():
        if key.endswith(("k_proj.bias", "key.bias")) or torch.equal(value, start[key]):
            continue
        keep = torch.ones_like(value, dtype=torch.bool)
        if key.endswith(("qkv.bias", "in_proj_bias")):
            third = len(value) // 3
            keep[third : 2 * third] = False
        gap += float((a[key] - value)[keep].double().square().sum())
        update += float((value - start[key])[keep].double().square().sum())
    assert update > 0
    return math.sqrt(gap / update)
