"""Slow ranks and nodes are named, and what makes them slow."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_ranks import SECONDS
from small_onellm import get_small_keys
from torch import nn
from toy_runs import Runs

from onellm_dist.train.callbacks.stragglers import Straggler, StragglerDetector
from onellm_dist.train.step.forward_clock import ForwardClock


def run_detector(
    nodes: list[str], slow: dict[int, float], kind: str = "compute", steps: int = 12
) -> list[list[Straggler]]:
    """What is found in each measured step of 1 s; compute varies by a tenth."""
    detector, generator = StragglerDetector(nodes), random.Random(0)
    found = []
    for _ in range(steps):
        seconds = {
            "data": [0.01] * len(nodes),
            "compute": [0.4 * generator.uniform(0.9, 1.1) for _ in nodes],
            "host": [0.02] * len(nodes),
        }
        for rank, extra in slow.items():
            seconds[kind][rank] += extra
        found.append(detector.update(seconds, 1.0 + max(slow.values(), default=0.0)))
    return found


@pytest.mark.parametrize("kind", ["data", "compute", "host"])
def test_a_slow_rank_is_named_once_with_its_kind(kind: str) -> None:
    found = run_detector(["a", "a", "b", "b"], {2: 0.3}, kind)
    (straggler,) = [one for step in found for one in step]
    assert (straggler.kind, straggler.ranks) == (kind, (2,))
    assert straggler.excess == pytest.approx(0.3, rel=0.2)
    assert found[3], "after four measurements, which are sixteen steps"


def test_a_slow_node_is_named_as_one() -> None:
    found = run_detector(["a", "a", "b", "b", "c", "c"], {2: 0.3, 3: 0.35})
    assert [one.ranks for step in found for one in step] == [(2, 3)]


@pytest.mark.parametrize("slow", [{}, {1: 0.02}])
def test_nobody_is_named_for_noise(slow: dict[int, float]) -> None:
    assert not any(run_detector(["a"] * 4, slow, steps=40))
    assert not any(run_detector(["a"], {0: 0.5}))


def test_one_that_recovers_is_named_again() -> None:
    detector, found = StragglerDetector(["a", "a"]), []
    for step in range(60):
        slow = 0.5 if step < 20 or step >= 40 else 0.0
        seconds = {"compute": [0.4, 0.4 + slow], "data": [0.0, 0.0], "host": [0.0, 0.0]}
        found += [step for _ in detector.update(seconds, 1.0)]
    assert len(found) == 2 and found[0] == 3 and 40 < found[1] < 48


class Sleeping(nn.Module):
    """Its parts sleep in their forward; the hooks of an engine sleep around them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        found: torch.Tensor = self.inner(x)
        return found


def test_the_clock_counts_the_model_and_not_the_engine() -> None:
    model = Sleeping()

    def gather(*_: Any) -> None:
        time.sleep(0.05)

    model.register_forward_pre_hook(gather)
    model.inner.register_forward_pre_hook(gather)
    model.inner.register_forward_hook(gather)
    clock = ForwardClock(model, torch.device("cpu"))
    with clock.measure():
        for _ in range(2):
            with clock.run():
                model(torch.zeros(1, 2))
        model(torch.zeros(1, 2))  # a recomputation in backward
    assert 0.04 <= clock.read() < 0.09
    assert len(model._forward_pre_hooks) == 1 and len(model.inner._forward_hooks) == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_slow_rank_and_a_slow_loader_are_named_and_distinguished(
    tmp_path: Path, engine: str
) -> None:
    keys = get_small_keys()
    runs = Runs(tmp_path, ("image", "imu"), 16, train__steps=20, data__global_batch=4, **keys)
    folder = runs.run(
        "slow",
        2,
        train__callbacks="[slow_ranks:SlowForward, slow_ranks:SlowLoader]",
        engine__name=engine,
        engine__config="cpu" if engine == "deepspeed" else "",
    )
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    found = {event["kind"]: event for event in events if event["event"] == "straggler"}
    assert found["compute"]["ranks"] == [1] and found["data"]["ranks"] == [0]
    assert found["compute"]["step"] < 20 and found["data"]["seconds"] == pytest.approx(
        SECONDS, rel=0.4
    )
    assert "host" not in found
