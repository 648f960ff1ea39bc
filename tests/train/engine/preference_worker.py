"""Run by test_preference_matrix.py on every rank: DPO under many engines, against plain torch.

The plain reference is one process, an answer at a time, unpadded and unpacked, with a deep copy of
the model as it was before the first step.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matrix_model import MODALITIES, SEED, assign_samples, get_step_modalities, tiny_config
from matrix_variants import absent_gradients, make_plain_optimizer, prepare
from matrix_worker import CLIP, State, copy_weights, fill_adapters, select_trained
from torch import nn
from torch.nn import functional

from onellm_dist.config.train_sections import DpoSection
from onellm_dist.launch.local import end_with_parent
from onellm_dist.launch.ranks import discover_ranks
from onellm_dist.modalities import all_modalities
from onellm_dist.model.adapters.lora import AdapterWeights
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.losses.preference import list_copies, prepare_preference
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.model.weights.lazy import InitialWeights, RandomWeights, build_empty_model
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.train.distributed import Distributed, join, leave
from onellm_dist.train.engine.deepspeed.config import load_ds_config
from onellm_dist.train.engine.fsdp.description import FsdpOptions
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings
from onellm_dist.train.export.model import gather_weights
from onellm_dist.train.optim.optimizers import make_optimizer

STEPS, BETA, SMOOTHING = 20, 0.5, 0.1
STAGES = {"adapter": "adapters", "copy": "both"}
"""Reference to what trains: adapters everywhere, or everything but the encoder."""


class Pair(NamedTuple):
    """A prompt with a medium, and two answers of different lengths."""

    prompt: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    modality: str
    value: torch.Tensor | None


def draw_pair(step: int, number: int) -> Pair:
    """Chosen answers are of other words than rejected ones: there is something to learn."""
    drawn = torch.Generator().manual_seed(1000 * step + number)

    def draw(low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=drawn)

    name = get_step_modalities(step)[number]
    shape = all_modalities()[name].value_shape if name else ()
    return Pair(
        torch.cat([torch.tensor([1]), draw(3, 20, 1 + number % 3)]),
        draw(20, 24, 2 + number % 2),
        draw(24, 28, 1 + number % 4),
        name,
        torch.randn(shape, generator=drawn) if name else None,
    )


def make_pack(step: int, numbers: list[int]) -> PackedBatch:
    """Pairs of a step in one pack; none: an empty micro-batch."""
    pairs = [draw_pair(step, number) for number in numbers]
    values = {}
    for modality in MODALITIES:
        own = [p.value for p in pairs if p.modality == modality and p.value is not None]
        shape = all_modalities()[modality].value_shape
        values[modality] = torch.stack(own) if own else torch.zeros((0, *shape))
    if not pairs:
        ids, labels = torch.tensor([1]), torch.tensor([IGNORE])
        empty = ids, labels, (1,), ((),), values, torch.zeros(1)
        return PackedBatch(*empty, is_empty=True, chosen_tokens=(0,))
    ids = torch.cat([torch.cat([p.prompt, a]) for p in pairs for a in (p.chosen, p.rejected)])
    labels = torch.cat(
        [
            torch.cat([torch.full_like(p.prompt, IGNORE), a])
            for p in pairs
            for a in (p.chosen, p.rejected)
        ]
    )
    return PackedBatch(
        ids,
        labels,
        tuple(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs),
        tuple((p.modality,) if p.modality else () for p in pairs),
        values,
        torch.ones(len(pairs)),
        tuple(f"{step}-{n}" for n in numbers),
        chosen_tokens=tuple(len(p.prompt) + len(p.chosen) for p in pairs),
    )


def score(model: Any, pair: Pair, answer: torch.Tensor) -> torch.Tensor:
    """Log-probability of an answer, from the logits of one unpacked text."""
    ids = torch.cat([pair.prompt, answer])
    media = {} if pair.value is None else {f"{pair.modality}_values": pair.value[None]}
    logits = model(input_ids=ids[None], **media).logits[0]
    first = len(logits) - len(answer) - 1
    log_probs = functional.log_softmax(logits[first:-1].float(), dim=-1)
    return log_probs.gather(1, answer[:, None]).sum()


def train_plain(stage: str) -> dict[str, Any]:
    """Train with plain torch (and PEFT): equation 7 of arXiv 2305.18290, with label smoothing."""
    model: Any = OneLLMForConditionalGeneration(tiny_config())
    initialise(model, SEED)
    reference = copy.deepcopy(model).eval()
    variant = prepare(model, stage, "adamw")
    fill_adapters(model)
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    stepper = make_plain_optimizer(variant)
    found: dict[str, Any] = {"before": copy_weights(model), "losses": [], "trained": list(trained)}
    found["margins"] = []
    for step in range(STEPS):
        stepper.zero_grad()
        total, margins, count = 0.0, 0.0, len(get_step_modalities(step))
        for number in range(count):
            pair = draw_pair(step, number)
            with torch.no_grad():
                there = score(reference, pair, pair.chosen) - score(reference, pair, pair.rejected)
            here = score(model, pair, pair.chosen) - score(model, pair, pair.rejected)
            margin = BETA * (here - there)
            loss = -functional.logsigmoid(margin) * (1 - SMOOTHING)
            loss = (loss - functional.logsigmoid(-margin) * SMOOTHING) / count
            loss.backward()
            total += float(loss.detach())
            margins += float(margin.detach()) / count
        absent_gradients(trained.values())
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        stepper.step()
        found["losses"].append(total)
        found["margins"].append(margins)
    return found | {"after": copy_weights(model)}


def train_sharded(dist: Distributed, job: dict[str, Any]) -> dict[str, Any]:
    """Train the same steps under a job's engine."""
    model: Any = build_empty_model(tiny_config())
    variant = prepare(model, STAGES[job["reference"]], "adamw")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    initial = InitialWeights(RandomWeights(model, SEED))
    weights = AdapterWeights(initial, shapes, SEED)
    section = DpoSection(beta=BETA, label_smoothing=SMOOTHING, reference=job["reference"])
    prepare_preference(model, section)
    initial.copy(list_copies(model))
    enable_activation_checkpointing(model, job.get("recompute", "none"))
    model.train()
    config = job.get("config", {})
    settings = EngineSettings(
        world_size=dist.world_size,
        device=dist.device,
        bf16=False,
        optimizer=make_optimizer(variant.optim),
        grad_clip=CLIP,
        options=FsdpOptions(**job["fsdp"])
        if "fsdp" in job
        else load_ds_config(Path(config))
        if isinstance(config, str)
        else json.loads(json.dumps(config)),
        frozen_resident=job.get("resident", False),
    )
    kind = get_engine("fsdp" if "fsdp" in job else "deepspeed").load()
    engine = kind.wrap(model, variant.torch_groups, settings, weights)
    losses, margins = [], []
    for step in range(STEPS):
        mine = assign_samples(step, dist.world_size, job["accumulate"])[dist.rank]
        count, total = len(get_step_modalities(step)), torch.zeros(2, dtype=torch.float64)
        for i, numbers in enumerate(mine):
            loss, _, _, rewards = engine.forward(make_pack(step, numbers), last=i == len(mine) - 1)
            engine.backward(loss, count)
            own = (rewards[:, 0] - rewards[:, 1]).double().sum() if numbers else 0.0
            total += torch.tensor([float(loss.detach()), float(own)], dtype=torch.float64)
        dist.sum(total)
        assert engine.step(variant.rates)
        losses.append(total[0].item() / count)
        margins.append(total[1].item() / count)
    masters: State = {}
    for ranges in dist.gather(
        [(r.name, r.shape, r.start, r.read("master").clone()) for r in engine.ranges()]
    ):
        for name, shape, start, values in ranges:
            whole = masters.setdefault(name, torch.full(shape, torch.nan)).view(-1)
            whole[start : start + len(values)] = values
    full = gather_weights(engine, model, is_rank_zero=dist.is_rank_zero)
    state = {name: t for name, t in full if not t.is_meta}
    copies = dict(engine.full_weights(lambda name: name.startswith("reference.")))
    assert all(name.startswith("reference.") for name in copies), "others are not gathered"
    return {
        "state": state,
        "masters": masters,
        "losses": losses,
        "margins": margins,
        "copies": copies,
    }


def compare(found: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    before, after, trained = right["before"], right["after"], right["trained"]
    masters, state = found["masters"], found["state"]

    def norm(one: State, other: State) -> float:
        gaps = (float(select_trained(n, one[n] - other[n]).square().sum()) for n in trained)
        return math.sqrt(sum(gaps))

    pairs = zip(found["losses"], right["losses"], strict=True)
    return {
        "loss": max(abs(a - b) / b for a, b in pairs),
        "margin": max(abs(a - b) for a, b in zip(found["margins"], right["margins"], strict=True)),
        "update": norm(masters, after) / norm(before, after),
        "first": found["losses"][0],
        "fall": 1 - sum(right["losses"][-5:]) / sum(right["losses"][:5]),
        "complete": sorted(masters) == sorted(trained),
        "frozen": [n for n in before if n not in trained and not torch.equal(state[n], before[n])],
        "exported": not any(n.startswith("reference.") for n in state),
        "copies": len(found["copies"]),
        "moved_copies": [
            n
            for n, t in found["copies"].items()
            if not t.is_meta and not torch.equal(t, before[n.removeprefix("reference.")])
        ],
    }


def main() -> None:
    end_with_parent()
    ranks = discover_ranks()
    assert ranks is not None
    torch.set_num_threads(1)
    dist = join(ranks)
    out, file = Path(sys.argv[1]), Path(sys.argv[2])
    jobs = json.loads((out / "jobs.json").read_text())
    found = {}
    if dist.is_rank_zero:
        known = torch.load(file, weights_only=False) if file.exists() else {}
        for reference in {job["reference"] for job in jobs} - known.keys():
            known[reference] = train_plain(STAGES[reference])
        torch.save(known, file)
    for job in jobs:
        result = train_sharded(dist, job)
        if dist.is_rank_zero:
            right = torch.load(file, weights_only=False)[job["reference"]]
            found[job["name"]] = compare(result, right)
    if dist.is_rank_zero:
        (out / "found.json").write_text(json.dumps(found))
    leave()
    os._exit(0)


if __name__ == "__main__":
    main()
