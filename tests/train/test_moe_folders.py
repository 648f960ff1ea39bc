"""Training from folders of MoE LLMs on two ranks: both engines read every expert as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import save_moe_model
from toy_runs import Runs

from onellm_dist.model import OneLLMForConditionalGeneration

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("mixtral", {"engine__name": "fsdp"}),
        ("qwen3_moe", {"engine__name": "deepspeed", "engine__config": "zero3"}),
    ],
    ids=["mixtral-fsdp", "qwen3_moe-zero3"],
)
def test_a_moe_folder_trains_and_keeps_its_frozen_llm(
    family: str, engine: dict[str, Any], tmp_path: Path
) -> None:
    start = save_moe_model(family, tmp_path / "start").state_dict()
    runs = Runs(
        tmp_path,
        ("imu",),
        8,
        train__steps=2,
        data__global_batch=4,
        model__preset="null",
        model__path=tmp_path / "start",
    )
    runs.run("run", 2, **engine)
    losses = [line["loss"] for line in runs.metrics("run").values()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    trained = OneLLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    after = trained.state_dict()
    llm = [name for name in start if name.startswith("llm.")]
    assert any("experts" in name for name in llm)
    assert all(torch.equal(after[name], start[name]) for name in llm)
    moved = {name for name in start if not torch.equal(after[name], start[name])}
    assert any(name.startswith("upm.") for name in moved)
