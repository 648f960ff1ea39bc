"""The DeepSpeed JSON: which ones load, what they may not set, and what is filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

from onellm_dist.common.errors import UsageError
from onellm_dist.common.resources import ds_configs_dir
from onellm_dist.train.engine.deepspeed.config import (
    complete_config,
    get_zero_stage,
    load_ds_config,
)


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
