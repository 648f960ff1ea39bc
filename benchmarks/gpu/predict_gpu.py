"""What the planner predicts for the micro-batches that `measure_gpu.py` runs; it needs no GPU.

It runs beside the measurement, which keeps the GPU busy meanwhile, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpu_steps import STAGES
from gpu_workload import Setting, Workload

from onellm_dist.config.train_sections import OptimSection, TrainSection
from onellm_dist.launch.local import end_with_parent
from onellm_dist.model.modality_tokens import find_idle_passes
from onellm_dist.model.model_kernels import set_kernels
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.planner.cost_model import build_cost_model
from onellm_dist.planner.counting import count_pack
from onellm_dist.planner.hardware import get_gpu_kind
from onellm_dist.planner.pack_shapes import PackShape, make_meta_batch, measure_sizes
from onellm_dist.planner.run_plan import build_model, get_modalities
from onellm_dist.planner.time import DeviceClock
from onellm_dist.train.optim.rules import prepare_parameters

GIBI = 2**30


def main() -> int:
    """Predict stage after stage; what is known is written at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--images", type=int, default=107)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    end_with_parent()
    work = Workload(given.tiny, given.images)
    packs = {"stage I": work.make_stage1(), "stage II": work.make_stage2()}
    found: dict[str, Any] = {}
    for name, setting in STAGES.items():
        found[name] = predict(work, setting, packs.get(name) or work.make_tune(), given.gpu)
        new = given.out.with_suffix(".new")
        new.write_text(json.dumps(found), encoding="utf-8")
        new.replace(given.out)
    return 0


def predict(work: Workload, setting: Setting, packs: list[PackShape], gpu: str) -> dict[str, float]:
    """Samples per second, FLOPs and peak memory of a plain step."""
    model: Any = build_model(work.config).bfloat16()
    train = TrainSection.model_validate({"stage": setting.stage, "steps": 1})
    prepare_parameters(model, train, OptimSection(lr=1e-5), set(setting.present))
    model.idle_passes = find_idle_passes(model, setting.present)
    set_kernels(model, setting.kernels, "cuda")
    enable_activation_checkpointing(model, setting.recompute)
    model.train()
    modalities = get_modalities(work.config)
    kinds = list(dict.fromkeys(sample.spans for pack in packs for sample in pack))
    costs = build_cost_model(model, kinds, modalities)
    kind = get_gpu_kind(gpu)
    clock = DeviceClock(costs, kind, "bf16")
    sizes = [measure_sizes(pack, modalities) for pack in packs]
    times = [clock.measure(size) for size in sizes]
    seconds = sum(time.forward + time.backward for time in times)
    flops = sum(costs.count_flops(size, recompute=False) for size in sizes)
    counted = count_pack(model, make_meta_batch(packs[0], list(modalities.values())))
    weights = sum(p.numel() * 2 for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The plain loop's bf16 gradients and AdamW's two moments (none in tuning: it is not stepped).
    state = trained * (6 if setting.stage == "align" else 2)
    return {
        "samples_per_s": sum(map(len, packs)) / seconds,
        "flops": flops,
        "peak_tflops": kind.peak_tflops["bf16"],
        "peak_gib": (weights + state + counted.peak) / GIBI,
    }


if __name__ == "__main__":
    raise SystemExit(main())
