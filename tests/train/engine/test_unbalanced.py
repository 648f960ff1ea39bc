"""A small OneLLM under ZeRO-2, ZeRO-3 and FSDP2 with unbalanced modalities.

Rank 0 gets only images and rank 1 only audio; then audio is absent for two steps; IMU never comes.
At last samples have several media inside their texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from zygote import run_ranks

pytestmark = pytest.mark.slow
ENGINES = ("zero2", "cpu", "fsdp")
"""`cpu` is ZeRO-3 that shards every weight; `zero3` shards none of so small a model."""


def train(out: Path, model: str, engines: Sequence[str]) -> dict[str, Any]:
    """What each engine gives for the small or the toy model, compared with plain torch."""
    worker = Path(__file__).parent / "onellm_worker.py"
    run_ranks(worker, [str(out), model, *engines], 2)
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("unbalanced"), "small", ENGINES)


def check_updates(one: dict[str, Any]) -> None:
    assert one["losses"] < 1e-4
    assert {part: error for part, error in one["errors"].items() if error > 1e-3} == {}


def check_weights(one: dict[str, Any]) -> None:
    # IMU was never assigned: what of it does not decay, or is zero, stays.
    assert [name for name in one["unmoved"] if name.split(".")[1] != "imu"] == []
    assert one["frozen"]


@pytest.mark.parametrize("engine", ENGINES)
def test_updates_equal_one_process(found: dict[str, Any], engine: str) -> None:
    check_updates(found[engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_trainable_weight_moves_and_every_frozen_one_is_bit_identical(
    found: dict[str, Any], engine: str
) -> None:
    check_weights(found[engine])


@pytest.mark.soak
def test_the_toy_model_does_so_too(tmp_path: Path) -> None:
    found = train(tmp_path, "toy", [*ENGINES, "zero3"])
    assert len(found) == 4
    for one in found.values():
        check_updates(one)
        check_weights(one)
