"""Run by test_engine_matrix.py on every rank.

Many engine configurations train the tiny OneLLM in turn; each is compared with plain torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups as deepspeed_groups
from matrix_model import (
    SEED,
    assign_samples,
    get_step_modalities,
    global_valid_tokens,
    make_pack,
    tiny_config,
)
from matrix_variants import absent_gradients, make_plain_optimizer, prepare
from plain_float8 import use_plain_float8
from torch import nn

from onellm_dist.launch.local import end_with_parent
from onellm_dist.launch.ranks import discover_ranks
from onellm_dist.model.adapters.lora import AdapterWeights
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.quantised.linear import quantise_layers
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.model.weights.lazy import InitialWeights, RandomWeights, build_empty_model
from onellm_dist.train.distributed import Distributed, join, leave
from onellm_dist.train.engine.deepspeed.config import load_ds_config
from onellm_dist.train.engine.fsdp.description import FsdpOptions
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings
from onellm_dist.train.export.model import gather_weights
from onellm_dist.train.optim.optimizers import make_optimizer

CLIP = 2.0
State = dict[str, torch.Tensor]
Reference = dict[Any, Any]
"""Number of steps -> weights; `losses`; `trained`: names of what trains."""


def train_plain(
    stage: str,
    steps: tuple[int, ...],
    optimizer: str = "adamw",
    frozen: str = "plain",
    layers: int = 2,
    noise: float = 0.0,
) -> Reference:
    """Train with plain torch (and PEFT) in one process, sample by sample.

    With quantised frozen weights, torchao's own linear layers compute; in float8, plain ones. The
    UPM starts with its weights times 1 + `noise`.

    Returns:
        The weights before (key 0) and after each number of `steps`; the loss of every step.
    """
    model: Any = OneLLMForConditionalGeneration(tiny_config(layers))
    initialise(model, SEED)
    variant = prepare(model, stage, optimizer)
    fill_adapters(model)
    with torch.no_grad():
        for parameter in model.upm.parameters():
            parameter.mul_(1 + noise)
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    stepper = make_plain_optimizer(variant)
    found: Reference = {0: copy_weights(model), "losses": [], "trained": list(trained)}
    if frozen != "plain":
        if frozen == "fp8":
            use_plain_float8(model.llm)
        else:
            quantise_by_torchao(model, frozen)
            if stage == "align":
                expand_weights(model)
    for step in range(max(steps)):
        stepper.zero_grad()
        total = 0.0
        for number in range(len(get_step_modalities(step))):
            loss = model(packed=make_pack(step, [number])).loss / global_valid_tokens(step)
            loss.backward()
            total += float(loss.detach())
        absent_gradients(trained.values())
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        stepper.step()
        found["losses"].append(total)
        if step + 1 in steps:
            found[step + 1] = copy_weights(model)
    return found


def expand_weights(model: Any) -> None:
    """Put the values of torchao's weights into plain layers.

    torchao multiplies by the scales of int8 last. Gradients through the whole LLM then differ by
    1e-7, and AdamW makes 1e-3 of that where they are near zero.
    """
    for module in model.llm.modules():
        if hasattr(getattr(module, "weight", None), "qdata"):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)


def make_weights(model: Any) -> AdapterWeights:
    """The values with which a model with or without adapters starts."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return AdapterWeights(InitialWeights(RandomWeights(model, SEED)), shapes, SEED)


@torch.no_grad()
def fill_adapters(model: Any) -> None:
    weights = make_weights(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.copy_(weights.rows(name, 0, len(parameter)))


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
    return {n: p.detach().clone() for n, p in model.named_parameters() if type(p) is nn.Parameter}


def quantise_by_torchao(model: Any, kind: str) -> None:
    """Replace the frozen linear weights of the LLM but its head, as torchao's users do."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4

    def is_frozen_linear(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name

    if kind == "int8":
        quantize_(model.llm, Int8WeightOnlyConfig(), filter_fn=is_frozen_linear)
        return
    for name, module in model.llm.named_modules():
        if is_frozen_linear(module, name):
            # torchao's blocks of 256 scales are too wide for 16 or 44 of them.
            scales = math.gcd(module.weight.numel() // 64, 256)
            module.weight = nn.Parameter(to_nf4(module.weight.data, 64, scales), False)


def train_sharded(dist: Distributed, job: dict[str, Any]) -> tuple[State, State, list[float]]:
    """Train the same steps under a job's engine.

    Returns:
        (exported weights, full fp32 weights of what trains, losses).
    """
    model = build_empty_model(tiny_config(job.get("layers", 2)))
    variant = prepare(model, job.get("stage", "align"), job.get("optimizer", "adamw"))
    enable_activation_checkpointing(model, job.get("recompute", "none"))
    model.train()
    weights = make_weights(model)
    if "frozen_weights" in job:
        kind, dtype = job["frozen_weights"], torch.bfloat16 if job.get("bf16") else torch.float32
        quantise_layers(model, kind, weights, dtype=dtype, device=dist.device)
    config = job.get("config", {})
    config = (
        load_ds_config(Path(config)) if isinstance(config, str) else json.loads(json.dumps(config))
    )
    settings = EngineSettings(
        world_size=dist.world_size,
        device=dist.device,
        bf16=job.get("bf16", False),
        optimizer=make_optimizer(variant.optim),
        grad_clip=CLIP,
        options=FsdpOptions(**job["fsdp"]) if "fsdp" in job else config,
        frozen_resident=job.get("resident", False),
    )
    kind = get_engine("fsdp" if "fsdp" in job else "deepspeed").load()
    engine = kind.wrap(model, variant.torch_groups, settings, weights)
    losses = []
    for step in range(job["steps"]):
        mine = assign_samples(step, dist.world_size, job["accumulate"])[dist.rank]
        total = torch.zeros(1, dtype=torch.float64)
        for i, numbers in enumerate(mine):
            loss, _, _ = engine.forward(make_pack(step, numbers), last=i == len(mine) - 1)
            engine.backward(loss, global_valid_tokens(step))
            total += loss.detach().double()
        dist.sum(total)
        assert engine.step(variant.rates)
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
    full = gather_weights(engine, model, is_rank_zero=dist.is_rank_zero)
    return {name: t for name, t in full if not t.is_meta}, masters, losses


def measure_gaps(
    steps: int, weights: State, losses: list[float], right: Reference
) -> dict[str, float]:
    """The largest relative difference of a loss, and that of the update."""
    before, after, trained = right[0], right[steps], right["trained"]
    gap = (
        sum(float(select_trained(n, weights[n] - after[n]).square().sum()) for n in trained) ** 0.5
    )
    update = (
        sum(float(select_trained(n, after[n] - before[n]).square().sum()) for n in trained) ** 0.5
    )
    loss = max(abs(a - b) / b for a, b in zip(losses, right["losses"], strict=False))
    return {"loss": loss, "update": gap / update}


def compare(
    job: dict[str, Any], state: State, masters: State, losses: list[float], right: Reference
) -> dict[str, Any]:
    before, trained = right[0], right["trained"]
    groups = {
        n.rsplit(".", 2)[0] if n.startswith("upm") else ".".join(n.split(".")[:3]) for n in trained
    }
    dtype = torch.bfloat16 if job.get("bf16") else torch.float32
    return {
        **measure_gaps(job["steps"], masters, losses, right),
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
        "noise": right.get("noise"),
    }


def get_reference_key(job: dict[str, Any]) -> tuple[str, str, str, int]:
    return (
        job.get("stage", "align"),
        job.get("optimizer", "adamw"),
        job.get("frozen_weights", "plain"),
        job.get("layers", 2),
    )


def measure_noise(
    stage: str, optimizer: str, frozen: str, layers: int, right: Reference
) -> dict[str, float]:
    """How far plain torch comes from itself where the UPM starts one bit away."""
    other = train_plain(stage, (20,), optimizer, frozen, layers, noise=1e-7)
    return measure_gaps(20, other[20], other["losses"], right)


def train_references(file: Path, jobs: list[dict[str, Any]]) -> None:
    """Add what plain torch gives for jobs to the file that the starts of a test share."""
    known = torch.load(file, weights_only=False) if file.exists() else {}
    asked: dict[tuple[str, str, str, int], set[int]] = {}
    for job in jobs:
        asked.setdefault(get_reference_key(job), set()).add(job["steps"])
    for key, steps in asked.items():
        if steps <= known.get(key, {}).keys():
            continue
        stage, optimizer, frozen, layers = key
        known[key] = train_plain(stage, tuple(steps), optimizer, frozen, layers)
        if (stage, frozen) == ("align", "fp8"):
            known[key]["noise"] = measure_noise(*key, known[key])
    torch.save(known, file)


def main() -> None:
    end_with_parent()
    ranks = discover_ranks()
    assert ranks is not None
    torch.set_num_threads(1)
    dist = join(ranks)
    out, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    file = Path(sys.argv[3])
    if dist.is_rank_zero:
        train_references(file, jobs)
    found = {}
    for job in jobs:
        started = time.perf_counter()
        result = train_sharded(dist, job)
        # DeepSpeed makes hpZ's groups once a process; here the next job may want them too.
        deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        if dist.is_rank_zero:
            right = torch.load(file, weights_only=False)[get_reference_key(job)]
            found[job["name"]] = compare(job, *result, right) | {
                "seconds": time.perf_counter() - started
            }
    if dist.is_rank_zero:
        (out / "found.json").write_text(json.dumps(found))
    leave()
    os._exit(0)


if __name__ == "__main__":
    main()
