"""The DeepSpeed JSON: which ones load, what they may not set, and what is filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onellm_dist.common.errors import UsageError
from onellm_dist.common.resources import ds_configs_dir
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.presets import build_config
from onellm_dist.train.engine.deepspeed.config import (
    complete_config,
    get_zero_stage,
    load_ds_config,
)
from onellm_dist.train.engine.deepspeed.leaves import name_leaves


def test_every_shipped_deepspeed_configuration_loads() -> None:
    stages = {
        path.stem: get_zero_stage(load_ds_config(Path(path.stem)))
        for path in ds_configs_dir().glob("*.json")
    }
    assert stages == {
        "zero1": 1,
        "zero2": 2,
        "zero3": 3,
        "zero3_leaves": 3,
        "zero3_offload": 3,
        "zero3_hpz": 3,
        "cpu": 3,
        "cpu_small": 3,
    }


def name_classes(model: Any, *given: str) -> list[str]:
    zero = {"stage": 3, "leaf_module": {"classes": list(given)}}
    config = name_leaves({"zero_optimization": zero}, model)
    found: list[str] = config["zero_optimization"]["leaf_module"]["classes"]
    return found


def test_only_classes_of_frozen_blocks_are_leaves() -> None:
    """DeepSpeed would reduce the first trained block's gradients before they are there."""
    given = load_ds_config(Path("zero3_leaves"))["zero_optimization"]["leaf_module"]["classes"]
    assert given == ["EncoderBlock", "UPMBlock", "LlamaDecoderLayer"]
    with torch.device("meta"):
        model: Any = OneLLMForConditionalGeneration(build_config("toy"))
    model.requires_grad_(False)
    assert name_classes(model, *given) == sorted(given)
    model.upm.requires_grad_(True)
    assert name_classes(model, *given) == ["EncoderBlock", "LlamaDecoderLayer"]
    # One weight of the last block is enough; the class has other names too.
    layer = model.llm.model.layers[-1]
    layer.input_layernorm.requires_grad_(True)
    qualified = f"{type(layer).__module__}.LlamaDecoderLayer"
    assert name_classes(model, *given, qualified, "LlamaMLP") == ["EncoderBlock", "LlamaMLP"]
    layer.mlp.down_proj.requires_grad_(True)
    assert name_classes(model, *given, "LlamaMLP") == ["EncoderBlock"]
    # Blocks of an LLM that the JSON does not name.
    model.requires_grad_(False)
    assert name_classes(model, "EncoderBlock") == sorted(given)


def test_gradients_accumulate_in_fp32() -> None:
    full = complete_config(load_ds_config(Path("zero3")), bf16=True, grad_clip=2.0)
    assert full["data_types"]["grad_accum_dtype"] == "fp32"
    assert full["bf16"]["enabled"] and full["gradient_clipping"] == 2.0


def test_deepspeed_does_not_time_each_forward_unless_asked() -> None:
    from deepspeed.utils.config import get_timers_config

    own = load_ds_config(Path("zero3"))
    assert not get_timers_config(complete_config(own, bf16=True, grad_clip=2.0)).enabled
    asked = {**own, "timers": {"throughput": {"enabled": True, "synchronized": False}}}
    timers = get_timers_config(complete_config(asked, bf16=True, grad_clip=2.0))
    assert timers.enabled and not timers.synchronized


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"optimizer": {}, "bf16": {}}', "optimizer .* bf16"),
        (
            '{"zero_optimization": {"stage": 3, '
            '"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}',
            "offload_param to nvme",
        ),
        (
            '{"zero_optimization": {"stage": 3, '
            '"offload_optimizer": {"device": "cpu", "ratio": 0.3}}}',
            "ratio 0.3",
        ),
        (
            '{"zero_optimization": {"stage": 3, "leaf_module": {"names": ["llm.model.layers.0"], '
            '"name_suffixes": "mlp"}}}',
            "leaf_module.names and leaf_module.name_suffixes",
        ),
        (
            '{"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 100000}}',
            "has stage3_module_granularity_threshold",
        ),
        (
            '{"zero_optimization": {"stage": 3, "leaf_module": ["EncoderBlock"]}}',
            "zero_optimization.leaf_module",
        ),
    ],
)
def test_wrong_deepspeed_configurations_are_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_ds_config(path)


def test_unknown_deepspeed_configuration_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="zero3_hpz"):
        load_ds_config(Path("zero9"))


def test_bf16_without_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="stage 0"):
        complete_config({}, bf16=True, grad_clip=1.0)
