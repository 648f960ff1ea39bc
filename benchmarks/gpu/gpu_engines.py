"""Each engine on one rank: what its hooks, copies and waits add to the plain loop."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import torch
from gpu_record import Record, clock, free_memory, get_peak_gib
from gpu_steps import STAGE1
from gpu_workload import Workload
from torch import distributed as dist

from onellm_dist.config.schema import EngineSection
from onellm_dist.config.train_sections import OptimSection
from onellm_dist.launch.local import find_free_port
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings
from onellm_dist.train.optim.groups import build_parameter_groups
from onellm_dist.train.optim.optimizers import make_optimizer
from onellm_dist.train.optim.rules import ParameterRate

LEAVES = '{"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["EncoderBlock"]}}}'
"""ZeRO-3 with leaf modules: the engine adds the model's own blocks to a name that is given."""


def list_engines(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> `engine` section of what can run here."""
    found: dict[str, dict[str, Any]] = {
        "FSDP2": {"name": "fsdp"},
        "FSDP2, frozen weights resident": {"name": "fsdp", "frozen": "resident"},
    }
    if importlib.util.find_spec("deepspeed") is not None:
        leaves = folder / "zero3_leaves.json"
        leaves.write_text(LEAVES, encoding="utf-8")
        found |= {
            "ZeRO-2": {"config": "zero2"},
            "ZeRO-3": {"config": "zero3"},
            "ZeRO-3, blocks as leaves": {"config": str(leaves)},
        }
    return found


def measure_engines(record: Record, work: Workload) -> None:
    """Steps of stage I under every engine."""
    port = find_free_port()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("nccl" if work.device.type == "cuda" else "gloo")
    try:
        for name, keys in list_engines(record.out).items():
            if record.left < 20:
                return
            try:
                _measure_engine(record, work, name, EngineSection.model_validate(keys))
            except torch.OutOfMemoryError:
                record.add(f"engine {name}", out_of_memory=True)
    finally:
        dist.destroy_process_group()


def _measure_engine(record: Record, work: Workload, name: str, section: EngineSection) -> None:
    free_memory()
    model = work.build(STAGE1)
    rate = ParameterRate(1.0, "constant", 0.1)
    rates = {n: rate for n, p in model.named_parameters() if p.requires_grad}
    groups = [group.to_torch() for group in build_parameter_groups(model, rates)]
    description = get_engine(section.name)
    settings = EngineSettings(
        world_size=1,
        device=work.device,
        bf16=work.dtype == torch.bfloat16,
        optimizer=make_optimizer(OptimSection(lr=1e-6)),
        grad_clip=2.0,
        options=description.read_options(section, world_size=1),
        frozen_resident=section.frozen == "resident",
    )
    engine = description.load().wrap(model, groups, settings)
    packs = work.make_stage1()
    batches = [work.make_batch(pack) for pack in packs]
    try:

        def step() -> None:
            for i, batch in enumerate(batches):
                loss, _, _ = engine.forward(batch.to(work.device), last=i == len(batches) - 1)
                engine.backward(loss, 5000)
            engine.grad_norms()
            engine.step(1e-6)

        seconds = clock(step, repeats=3, warm=2)  # ZeRO-3 traces the first
        moved = batches[0].to(work.device)
        started = time.perf_counter()
        loss, _, _ = engine.forward(moved, last=True)
        forward = time.perf_counter() - started
        engine.backward(loss, 5000)
        both = time.perf_counter() - started
        engine.step(1e-6)
        record.add(
            f"engine {name}",
            samples_per_s=sum(map(len, packs)) / seconds,
            host_forward_ms=1e3 * forward,
            host_forward_and_backward_ms=1e3 * both,
            peak_gib=get_peak_gib(),
        )
    finally:
        engine.close()
