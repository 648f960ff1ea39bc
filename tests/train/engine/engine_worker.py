"""Run by test_engine.py on every rank: many checks of several engines in one launch.

Rank 0 writes what was found to `found.json`.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_states import gather_full_state
from small_model import SmallModel, pack, sample, supervised
from stage_setup import make_groups
from torch.distributed.tensor import DTensor

from onellm_dist.config.train_sections import OptimSection
from onellm_dist.launch.local import end_with_parent
from onellm_dist.launch.ranks import discover_ranks
from onellm_dist.packed import PackedBatch
from onellm_dist.train.checkpoint.state import load_state
from onellm_dist.train.checkpoint.writer import save_state
from onellm_dist.train.distributed import Distributed, join, leave
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.engine.deepspeed.config import load_ds_config
from onellm_dist.train.engine.fsdp.description import FsdpOptions
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings
from onellm_dist.train.optim.optimizers import make_optimizer

LR, CLIP, DECAY = 1e-3, 0.5, 0.1
STEPS = (((0, 1, 2), ("a",)), ((3, 4), ("a",)), ((5, 6, 7), ("b",)), ((8, 9, 10, 11), ("a",)))
"""Step modulo 4 -> sample numbers and the modalities of the step; step 0 is mixed."""


def step_samples(step: int) -> list[PackedBatch]:
    if step == 0:
        return [
            sample(100, ("a",)),
            sample(101, ("b",)),
            sample(102, ("a",)),
            sample(103, ("b",)),
            sample(104, ()),
        ]
    numbers, names = STEPS[step % 4]
    return [sample(1000 * step + n, names) for n in numbers]


def assign_samples(step: int, world_size: int) -> list[list[list[PackedBatch]]]:
    """[rank][micro-batch] -> samples, two in a pack.

    In step 0 rank 0 gets only modality a and the last rank only b; in other steps samples take
    turns.
    """
    every = step_samples(step)
    if step == 0 and world_size > 1:
        ranks: list[list[PackedBatch]] = [[] for _ in range(world_size)]
        for one in every:
            ranks[world_size - 1 if one.modalities[0] == ("b",) else 0].append(one)
    else:
        ranks = [every[r::world_size] for r in range(world_size)]
    packs = [[own[i : i + 2] for i in range(0, len(own), 2)] for own in ranks]
    count = max(len(p) for p in packs)
    return [p + [[]] * (count - len(p)) for p in packs]


def new_model(job: dict[str, Any]) -> SmallModel:
    """A model of the job's stage, whose `blocks` are gathered by themselves."""
    torch.manual_seed(7)
    stage, model = job.get("stage", "align"), SmallModel(tuple(job.get("blocks", ())))
    for name, parameter in model.named_parameters():
        trained = (
            name.startswith(("branches", "upm"))
            if stage == "align"
            else name.startswith(("embedding", "llm"))
        )
        parameter.requires_grad_(trained)
    return model


def new_engine(
    dist: Distributed, model: SmallModel, job: dict[str, Any], bf16: bool = False
) -> Engine:
    """Wrap a model.

    The job's `config` is a DeepSpeed JSON or its name; `fsdp` has FSDP2's keys, and `resident` says
    that frozen weights are.
    """
    config = job.get("config", {})
    config = load_ds_config(Path(config)) if isinstance(config, str) else copy.deepcopy(config)
    parts = {
        name: name.split(".")[0]
        for name, _ in model.named_parameters()
        if not name.startswith("embedding")
    }
    settings = EngineSettings(
        world_size=dist.world_size,
        device=dist.device,
        bf16=bf16,
        optimizer=make_optimizer(OptimSection(lr=LR, **job.get("optim", {}))),
        grad_clip=CLIP,
        options=FsdpOptions(**job["fsdp"]) if "fsdp" in job else config,
        parts=parts,
        frozen_resident=job.get("resident", False),
    )
    engine = get_engine("fsdp" if "fsdp" in job else "deepspeed").load()
    return engine.wrap(model, make_groups(model, DECAY), settings)


def train(
    engine: Engine,
    dist: Distributed,
    steps: range,
    poisoned: int = -1,
    poisoned_empty: int = -1,
    discard: int = -1,
    watch: Callable[[bool], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Train some steps.

    Args:
        engine: steps the model.
        dist: the ranks.
        steps: indices of the steps.
        poisoned: a step in which the loss of one rank's first micro-batch is not finite.
        poisoned_empty: a step that gets one more micro-batch, empty on every rank, whose loss is
            not finite.
        discard: a good step that is skipped.
        watch: called after each backward pass with whether it is the step's last one.
    """
    done = []
    for step in steps:
        assigned = assign_samples(step, dist.world_size)[dist.rank]
        assigned += [[]] * (step == poisoned_empty)
        global_valid_tokens = sum(supervised(s) for s in step_samples(step))
        total = torch.zeros(1)
        for index, samples in enumerate(assigned):
            is_poisoned = step == poisoned_empty and index == len(assigned) - 1
            batch = pack(samples)
            if poisoned == step and dist.rank == dist.world_size - 1 and index == 0:
                batch.weights.fill_(float("inf"))
            loss, _, _ = engine.forward(batch, last=index == len(assigned) - 1)
            engine.backward(loss * float("nan") if is_poisoned else loss, global_valid_tokens)
            total += loss.detach().float()
            watch(index == len(assigned) - 1)
        dist.sum(total)
        norms = engine.grad_norms()
        applied = engine.step(LR, discard=step == discard)
        done.append(
            {
                "loss": total.item() / global_valid_tokens,
                "applied": applied,
                "norm": norms.total,
                "parts": norms.by_part,
            }
        )
    return done


def plain_optimizer(job: dict[str, Any], groups: Any) -> torch.optim.Optimizer:
    """torch's own optimizer, with the settings of a job."""
    optim = job.get("optim", {})
    if optim.get("name") == "sgd":
        return torch.optim.SGD(groups, lr=LR, **optim["options"])
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)


def reference(
    job: dict[str, Any], steps: range
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Train with plain torch in one process, each sample a pack.

    Returns:
        (weights, losses, norms of the gradient).
    """
    model = new_model(job)
    optimizer = plain_optimizer(job, make_groups(model, DECAY))
    losses, norms = [], []
    for step in steps:
        every = step_samples(step)
        optimizer.zero_grad()
        loss = sum(model(pack([s])).loss for s in every) / sum(supervised(s) for s in every)
        loss.backward()
        for p in model.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        norms.append(
            float(
                torch.nn.utils.clip_grad_norm_(
                    [p for p in model.parameters() if p.requires_grad], CLIP
                )
            )
        )
        optimizer.step()
        losses.append(float(loss.detach()))
    return {n: p.detach().clone() for n, p in model.named_parameters()}, losses, norms


def update_error(
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    trained: set[str],
) -> dict[str, float]:
    found = {}
    for name in trained:
        update = expected[name] - before[name]
        found[name] = float((after[name] - expected[name]).norm() / update.norm().clamp_min(1e-30))
    return found


def check(dist: Distributed, out: Path, job: dict[str, Any]) -> dict[str, Any]:
    name, bf16 = job["name"], job.get("bf16", False)
    model = new_model(job)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    engine = new_engine(dist, model, job, bf16)
    folder = out / name
    first = train(engine, dist, range(0, 5))
    save_state(folder, engine, dist, {"steps_done": 5})
    rest = train(engine, dist, range(5, 8))
    ended = gather_full_state(engine)
    poisoned = train(engine, dist, range(8, 9), poisoned=8)
    poisoned += train(engine, dist, range(8, 9), poisoned_empty=8)
    kept = gather_full_state(engine)
    discarded = train(engine, dist, range(8, 9), discard=8)
    still, count = gather_full_state(engine), engine.optimizer_steps
    train(engine, dist, range(8, 10))
    after = gather_full_state(engine)

    resumed = new_engine(dist, new_model(job), job, bf16)
    if job.get("resident"):
        forward_alone(resumed)
    load_state(folder, resumed, dist)
    again = train(resumed, dist, range(5, 8))
    second, steps = gather_full_state(resumed), resumed.optimizer_steps
    train(resumed, dist, range(8, 10))
    straight = gather_full_state(resumed)
    gathered = watch_gathered(dist, job, first) if job.get("resident") else {}
    if not dist.is_rank_zero:
        return {}
    expected, losses, norms = reference(job, range(8))
    errors = update_error(before, ended, expected, trained)
    return {
        "losses": max(abs(a["loss"] - b) for a, b in zip(first + rest, losses, strict=True)),
        "update_error": max(errors.values()),
        "worst": max(errors, key=lambda name: errors[name]),
        "frozen": all(
            torch.equal(ended[n].float(), before[n].to(ended[n].dtype).float())
            for n in before
            if n not in trained
        ),
        "moved": all(not torch.equal(ended[n].float(), before[n]) for n in trained),
        "resume_identical": all(torch.equal(ended[n], second[n]) for n in before),
        "resume_losses": max(abs(a["loss"] - b["loss"]) for a, b in zip(again, rest, strict=True)),
        "steps": steps,
        "poisoned_applied": any(step["applied"] for step in poisoned),
        "poisoned_kept": all(torch.equal(ended[n], kept[n]) for n in before),
        "discarded_applied": any(step["applied"] for step in discarded),
        "discarded_steps": count,
        "discarded_kept": all(torch.equal(ended[n], still[n]) for n in before),
        "goes_on_identical": all(torch.equal(after[n], straight[n]) for n in before),
        "norm_error": max(
            abs(s["norm"] / right - 1) for s, right in zip(first + rest, norms, strict=True)
        ),
        "norms": [s["norm"] for s in first],
        "parts": [s["parts"] for s in first],
        **gathered,
    }


def forward_alone(engine: Engine) -> None:
    """A forward pass with gradients that no backward follows, as a callback may have it."""
    engine.forward(pack(step_samples(1)), last=True)


def count_gathered(model: SmallModel) -> int:
    """Bytes of the trained weights that lie unsharded on this rank."""
    return sum(
        p.untyped_storage().nbytes()
        for p in model.parameters()
        if p.requires_grad and not isinstance(p, DTensor)
    )


def watch_gathered(
    dist: Distributed, job: dict[str, Any], right: list[dict[str, Any]]
) -> dict[str, Any]:
    """Train again with passes without backward before each step, and look at what lies unsharded.

    Args:
        dist: the ranks.
        job: of an engine that keeps frozen weights resident.
        right: what the same steps gave without those passes.
    """
    model = new_model(job)
    engine = new_engine(dist, model, job, job.get("bf16", False))
    held: dict[str, set[int]] = {}

    def look(when: str) -> None:
        held.setdefault(when, set()).add(count_gathered(model))

    def watch(last: bool) -> None:
        look("after_last" if last else "between")
        if last:
            with torch.no_grad():
                engine.forward(pack(step_samples(1)), last=True)
            look("validated")
            engine.logits(pack(step_samples(1)))
            look("logits")
            forward_alone(engine)
            look("forward_alone")

    found = train(engine, dist, range(len(right)), watch=watch)
    look("stepped")
    return {
        "held": {when: sorted(sizes) for when, sizes in held.items()},
        "whole": sum(p.numel() for p in model.parameters() if p.requires_grad)
        * engine.compute_dtype.itemsize,
        "same_beside_passes": found == right,
    }


def resume(dist: Distributed, job: dict[str, Any]) -> dict[str, Any]:
    """Train steps 5 to 7 from a checkpoint of another number of ranks, engine or ZeRO stage."""
    before = {n: p.detach().clone() for n, p in new_model(job).named_parameters()}
    model = new_model(job)
    engine = new_engine(dist, model, job)
    load_state(Path(job["from"]), engine, dist)
    steps = engine.optimizer_steps
    losses = [s["loss"] for s in train(engine, dist, range(5, 8))]
    ended = gather_full_state(engine)
    if not dist.is_rank_zero:
        return {}
    expected, right, _ = reference(job, range(8))
    errors = update_error(
        before, ended, expected, {n for n, p in model.named_parameters() if p.requires_grad}
    )
    return {
        "steps": steps,
        "losses": max(abs(a - b) for a, b in zip(losses, right[5:], strict=True)),
        "update_error": max(errors.values()),
    }


def main() -> None:
    end_with_parent()
    ranks = discover_ranks()
    assert ranks is not None
    torch.set_num_threads(1)
    dist = join(ranks)
    out, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    found = {}
    for job in jobs:
        found[job["name"]] = resume(dist, job) if "from" in job else check(dist, out, job)
    if dist.is_rank_zero:
        (out / "found.json").write_text(json.dumps(found))
    leave()
    import os

    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
