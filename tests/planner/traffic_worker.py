"""Run by test_traffic.py on every rank: the collectives of a step under each engine, in bytes."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from plain_counts import make_config
from stage_setup import freeze_for_stage, make_groups
from torch.utils._python_dispatch import TorchDispatchMode
from toy_packs import make_toy_pack

from onellm_dist.config.schema import EngineSection
from onellm_dist.config.train_sections import OptimSection
from onellm_dist.launch.local import end_with_parent
from onellm_dist.launch.ranks import discover_ranks
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.model.weights.lazy import InitialWeights, RandomWeights, build_empty_model
from onellm_dist.packed import PackedBatch
from onellm_dist.planner.counting import list_tensors
from onellm_dist.train.distributed import Distributed, join, leave
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings
from onellm_dist.train.optim.optimizers import make_optimizer

NAMES, TEXT, MICRO_BATCHES = ["image", "image", "imu"], 20, 2


class CollectiveBytes(TorchDispatchMode):
    """Adds up the largest tensors of each collective: what is gathered, or what is reduced."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation
        self.found: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            sides = [
                sum(x.nbytes for x in list_tensors(a if isinstance(a, list) else [a]))
                for a in args
                if isinstance(a, list | torch.Tensor)
            ]
            self.found[func._opname] += max(sides, default=0)
        return out


def measure(dist: Distributed, section: EngineSection, mode: str) -> dict[str, int]:
    """Bytes of each kind of collective in the second step (the first traces)."""
    model: Any = build_empty_model(make_config())
    freeze_for_stage(model, "align", NAMES)
    enable_activation_checkpointing(model, mode)
    model.train()
    engine_kind = get_engine(section.name)
    settings = EngineSettings(
        world_size=dist.world_size,
        device=dist.device,
        bf16=False,
        optimizer=make_optimizer(OptimSection(lr=1e-4)),
        grad_clip=0.0,
        options=engine_kind.read_options(section, world_size=dist.world_size),
        frozen_resident=section.frozen == "resident",
    )
    engine = engine_kind.load().wrap(
        model,
        make_groups(model, 0.1),
        settings,
        InitialWeights(RandomWeights(model, 0)),
    )
    own = {
        k: v for k, v in make_toy_pack(NAMES, TEXT).values.items() if k in model.config.modalities
    }
    pack = make_toy_pack(NAMES, TEXT)
    batch = PackedBatch(
        pack.input_ids, pack.labels, pack.text_token_counts, pack.modalities, own, pack.weights
    )
    for _ in range(2):
        with CollectiveBytes() as counter:
            for number in range(MICRO_BATCHES):
                loss, _, _ = engine.forward(batch, last=number == MICRO_BATCHES - 1)
                engine.backward(loss, 100)
            engine.step(1e-4)
    return dict(counter.found)


def main(out: Path, choices: list[tuple[str, dict[str, Any], str]]) -> None:
    end_with_parent()
    ranks = discover_ranks()
    assert ranks is not None
    dist = join(ranks)
    torch.set_num_threads(1)
    found = {
        name: measure(dist, EngineSection.model_validate(keys), mode)
        for name, keys, mode in choices
    }
    if dist.is_rank_zero:
        out.write_text(json.dumps(found))
    leave()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
