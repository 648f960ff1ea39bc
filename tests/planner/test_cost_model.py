"""What a micro-batch of any size does, predicted from four small ones, against a count of it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from plain_counts import make_config
from stage_setup import freeze_for_stage
from stages_and_modes import STAGES_AND_MODES

from onellm_dist.model.model_kernels import set_kernels
from onellm_dist.model.presets import build_config
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.planner.cost_model import build_cost_model
from onellm_dist.planner.counting import count_pack
from onellm_dist.planner.hardware import get_gpu_kind
from onellm_dist.planner.pack_shapes import PackShape, SampleShape, make_meta_batch, measure_sizes
from onellm_dist.planner.run_plan import build_model, get_modalities
from onellm_dist.planner.time import DeviceClock

KINDS = (("image",), ("video",), ("audio",), ("image", "imu"), ())
PACK: PackShape = (
    *[SampleShape(("image",), 17, 16)] * 11,
    *[SampleShape(("video",), 30, 12)] * 3,
    *[SampleShape(("audio",), 90, 1)] * 6,
    *[SampleShape(("image", "imu"), 5, 4)] * 2,
    SampleShape((), 200, 150),
)


def predict_and_count(config: Any, stage: str, mode: str, kinds: Any, pack: PackShape) -> None:
    model: Any = build_model(config)
    freeze_for_stage(model, stage, {name for kind in kinds for name in kind})
    enable_activation_checkpointing(model, mode)
    model.train()
    modalities = get_modalities(config)
    costs, sizes = build_cost_model(model, kinds, modalities), measure_sizes(pack, modalities)
    counted = count_pack(model, make_meta_batch(pack, list(modalities.values())))
    for part, size in counted.kept.items():
        assert costs.count_kept(sizes)[part] == pytest.approx(size, rel=1e-3, abs=4096), part
    flops: dict[tuple[str, str], float] = defaultdict(float)
    moved: dict[tuple[str, str], float] = defaultdict(float)
    for key, work in counted.operations.items():
        flops[key.part, key.phase] += work.flops
        moved[key.part, key.phase] += work.bytes
    for group in costs.groups:
        place = group.part, group.phase
        expected_flops, expected_bytes = group.evaluate(sizes)
        assert (expected_flops * group.repeats).sum() == pytest.approx(flops[place], rel=1e-6)
        assert (expected_bytes * group.repeats).sum() == pytest.approx(
            moved[place], rel=1e-3, abs=4096
        ), place


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "mode"), STAGES_AND_MODES)
def test_a_larger_micro_batch_is_predicted_part_by_part(stage: str, mode: str) -> None:
    predict_and_count(make_config(), stage, mode, KINDS, PACK)


@pytest.mark.slow
def test_107_images_of_the_paper_take_what_a_roofline_of_each_operation_says() -> None:
    """582, 1343 and 509 ms, 54.5 GB kept, 1.95 TFLOP a sample: an op by op count of 2026-11-28."""
    config = build_config("onellm-7b")
    model: Any = build_model(config).bfloat16()
    freeze_for_stage(model, "align", ["image"])
    model.train()
    modalities = get_modalities(config)
    costs = build_cost_model(model, [("image",)], modalities)
    sizes = measure_sizes((SampleShape(("image",), 17, 16),) * 107, modalities)
    assert costs.count_flops(sizes) / 107 == pytest.approx(1.950e12, rel=0.005)
    assert sum(costs.count_kept(sizes).values()) == pytest.approx(54.5e9, rel=0.005)
    for kind, seconds in (("a100-80", 1.343), ("h100-80", 0.5817), ("h200", 0.5087)):
        found = DeviceClock(costs, get_gpu_kind(kind), "bf16").measure(sizes)
        assert found.forward + found.backward == pytest.approx(seconds, rel=0.01), kind


@pytest.mark.slow
def test_fused_kernels_keep_less_of_107_images() -> None:
    """39 GB at most, of 54.5: norms, MLPs, rotations and loss keep their inputs alone."""
    config = build_config("onellm-7b")
    model: Any = build_model(config).bfloat16()
    freeze_for_stage(model, "align", ["image"])
    set_kernels(model, "auto", "cuda")
    modalities = get_modalities(config)
    costs = build_cost_model(model.train(), [("image",)], modalities)
    sizes = measure_sizes((SampleShape(("image",), 17, 16),) * 107, modalities)
    assert sum(costs.count_kept(sizes).values()) <= 39e9
    assert costs.count_flops(sizes) / 107 == pytest.approx(1.950e12, rel=0.005)
