"""The toy OneLLM under ZeRO-2, ZeRO-3 and FSDP2 with unbalanced modalities.

Rank 0 gets only images and rank 1 only audio; then audio is absent for two steps; IMU never comes.
At last samples have several media inside their texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from zygote import run_ranks

pytestmark = pytest.mark.slow
ENGINES = ("zero2", "cpu", "zero3", "fsdp")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("unbalanced")
    worker = Path(__file__).parent / "onellm_worker.py"
    run_ranks(worker, [str(out), *ENGINES], 2)
    results: dict[str, Any] = json.loads((out / "found.json").read_text())
    return results


@pytest.mark.parametrize("engine", ENGINES)
def test_updates_equal_one_process(found: dict[str, Any], engine: str) -> None:
    assert found[engine]["losses"] < 1e-4
    assert {part: error for part, error in found[engine]["errors"].items() if error > 1e-3} == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_trainable_weight_moves_and_every_frozen_one_is_bit_identical(
    found: dict[str, Any], engine: str
) -> None:
    # IMU was never assigned: what of it does not decay, or is zero, stays.
    assert [name for name in found[engine]["unmoved"] if name.split(".")[1] != "imu"] == []
    assert found[engine]["frozen"]
