"""Run by test_engine_matrix.py on every rank.

Many engine configurations train the tiny OneLLM in turn; each is compared with plain torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups as deepspeed_groups
from matrix_model import (
    MODALITIES,
    SEED,
    assign_samples,
    get_step_modalities,
    global_valid_tokens,
    make_pack,
    tiny_config,
)
from torch import nn

from onellm_dist.config.schema import OptimSection
from onellm_dist.launch.local import end_with_parent
from onellm_dist.launch.ranks import discover_ranks
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.lazy_weights import InitialWeights, RandomWeights, build_empty_model
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.train.distributed import Distributed, join, leave
from onellm_dist.train.engine.deepspeed.config import load_ds_config
from onellm_dist.train.engine.fsdp.description import FsdpOptions
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings
from onellm_dist.train.optim.optimizers import make_optimizer
from onellm_dist.train.optim.stages import build_parameter_groups, freeze_for_stage

LR, CLIP, DECAY, BETAS, EPS = 2e-3, 2.0, 0.1, (0.9, 0.95), 1e-8
State = dict[str, torch.Tensor]
Reference = dict[Any, Any]
"""Number of steps -> weights; `losses`; `trained`: names of what trains."""


def train_plain(stage: str, steps: tuple[int, ...]) -> Reference:
    """Train with plain torch in one process, sample by sample.

    Returns:
        The weights before (key 0) and after each number of `steps`; the loss of every step.
    """
    model = OneLLMForConditionalGeneration(tiny_config())
    initialise(model, SEED)
    freeze(model, stage)
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(build_parameter_groups(model, DECAY), lr=LR, betas=BETAS, eps=EPS)
    found: Reference = {0: copy_weights(model), "losses": [], "trained": list(trained)}
    for step in range(max(steps)):
        optimizer.zero_grad()
        total = 0.0
        for number in range(len(get_step_modalities(step))):
            loss = model(packed=make_pack(step, [number])).loss / global_valid_tokens(step)
            loss.backward()
            total += float(loss.detach())
        for parameter in trained.values():
            if parameter.grad is None:  # a modality that is absent has gradient zero
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        found["losses"].append(total)
        if step + 1 in steps:
            found[step + 1] = copy_weights(model)
    return found


def freeze(model: nn.Module, stage: str) -> None:
    """Set what trains; the stage `encoder` is `align` with the encoder trained too."""
    freeze_for_stage(
        model, "tune" if stage == "tune" else "align", MODALITIES, encoder=stage == "encoder"
    )


def select_trained(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return what of a weight has a gradient.

    The gradient of a key bias is zero in truth (it shifts all scores of a query alike), and AdamW
    moves it by noise.
    """
    if not name.endswith("attn.qkv.bias"):
        return tensor
    q, _, v = tensor.chunk(3)
    return torch.cat([q, v])


def copy_weights(model: nn.Module) -> State:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def train_sharded(dist: Distributed, job: dict[str, Any]) -> tuple[State, State, list[float]]:
    """Train the same steps under a job's engine.

    Returns:
        (exported weights, full fp32 weights of what trains, losses).
    """
    model = build_empty_model(tiny_config())
    freeze(model, job.get("stage", "align"))
    enable_activation_checkpointing(model, job.get("recompute", "none"))
    model.train()
    weights = InitialWeights(RandomWeights(model, SEED))
    config = job.get("config", {})
    config = (
        load_ds_config(Path(config)) if isinstance(config, str) else json.loads(json.dumps(config))
    )
    settings = EngineSettings(
        world_size=dist.world_size,
        device=dist.device,
        bf16=job.get("bf16", False),
        optimizer=make_optimizer(OptimSection(lr=LR, betas=BETAS, eps=EPS)),
        grad_clip=CLIP,
        options=FsdpOptions(**job["fsdp"]) if "fsdp" in job else config,
    )
    kind = get_engine("fsdp" if "fsdp" in job else "deepspeed").load()
    engine = kind.wrap(model, build_parameter_groups(model, DECAY), settings, weights)
    losses = []
    for step in range(job["steps"]):
        mine = assign_samples(step, dist.world_size, job["accumulate"])[dist.rank]
        total = torch.zeros(1, dtype=torch.float64)
        for i, numbers in enumerate(mine):
            loss, _, _ = engine.forward(make_pack(step, numbers), last=i == len(mine) - 1)
            engine.backward(loss, global_valid_tokens(step))
            total += loss.detach().double()
        dist.sum(total)
        assert engine.step(LR)
        losses.append(total.item() / global_valid_tokens(step))
    masters: State = {}
    for rank, ranges in enumerate(
        dist.gather([(r.name, r.shape, r.start, r.read("master").clone()) for r in engine.ranges()])
    ):
        for name, shape, start, values in ranges:
            masters.setdefault(name, torch.full(shape, torch.nan)).view(-1)[
                start : start + len(values)
            ] = values
        assert rank < dist.world_size
    return engine.gather_full_state(), masters, losses


def compare(
    job: dict[str, Any], state: State, masters: State, losses: list[float], right: Reference
) -> dict[str, Any]:
    before, after, trained = right[0], right[job["steps"]], right["trained"]
    gap = (
        sum(float(select_trained(n, masters[n] - after[n]).square().sum()) for n in trained) ** 0.5
    )
    update = (
        sum(float(select_trained(n, after[n] - before[n]).square().sum()) for n in trained) ** 0.5
    )
    groups = {
        n.rsplit(".", 2)[0] if n.startswith("upm") else ".".join(n.split(".")[:3]) for n in trained
    }
    dtype = torch.bfloat16 if job.get("bf16") else torch.float32
    return {
        "loss": max(abs(a - b) / b for a, b in zip(losses, right["losses"], strict=False)),
        "update": gap / update,
        "fall": 1 - sum(losses[-5:]) / sum(losses[:5]),
        "unmoved": [
            g
            for g in groups
            if not any(not torch.equal(masters[n], before[n]) for n in trained if n.startswith(g))
        ],
        "frozen": [
            n for n in before if n not in trained and not torch.equal(state[n], before[n].to(dtype))
        ],
        "complete": all(bool(torch.isfinite(m).all()) for m in masters.values())
        and set(masters) == set(trained),
        "exported": all(torch.equal(state[n], masters[n].to(dtype)) for n in trained),
        "losses": losses,
    }


def main() -> None:
    end_with_parent()
    ranks = discover_ranks()
    assert ranks is not None
    torch.set_num_threads(1)
    dist = join(ranks)
    out, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    file = Path(sys.argv[3])
    if dist.is_rank_zero and not file.exists():
        torch.save(
            {stage: train_plain(stage, (20, 32)) for stage in ("align", "tune", "encoder")}, file
        )
    found = {}
    for job in jobs:
        started = time.perf_counter()
        result = train_sharded(dist, job)
        # DeepSpeed makes hpZ's groups once a process; here the next job may want them too.
        deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        if dist.is_rank_zero:
            right = torch.load(file, weights_only=False)[job.get("stage", "align")]
            found[job["name"]] = compare(job, *result, right) | {
                "seconds": time.perf_counter() - started
            }
    if dist.is_rank_zero:
        (out / "found.json").write_text(json.dumps(found))
    leave()
    os._exit(0)


if __name__ == "__main__":
    main()
