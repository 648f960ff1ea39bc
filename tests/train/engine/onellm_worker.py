"""Run by test_unbalanced.py on every rank: a small OneLLM with unbalanced modalities."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from engine_states import gather_full_state
from small_onellm import build_small_config
from stage_setup import freeze_for_stage, make_groups

from onellm_dist.config.train_sections import OptimSection
from onellm_dist.launch.local import end_with_parent
from onellm_dist.launch.ranks import discover_ranks
from onellm_dist.modalities import all_modalities
from onellm_dist.model import OneLLMForConditionalGeneration
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.presets import build_config
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.train.distributed import Distributed, join, leave
from onellm_dist.train.engine.deepspeed.config import load_ds_config
from onellm_dist.train.engine.fsdp.description import FsdpOptions
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings
from onellm_dist.train.optim.optimizers import make_optimizer

LR, CLIP, DECAY, TOKENS = 1e-3, 2.0, 0.1, 6
MIXTURE = ("image", "audio", "imu")
ASSIGNED: tuple[tuple[list[list[str]], list[list[str]]], ...] = (
    ([["image", "image"], ["image"]], [["audio"]]),
    ([["image"]], [["image", "image"]]),
    ([["image"], ["image"]], []),
    ([["image"]], [["audio"]]),
    ([["image+audio+image+image", "image"], ["audio+audio"]], [["image+image"]]),
)
"""Step -> packs of rank 0 and of rank 1.

IMU is in the mixture and comes in no step; audio is absent for two steps. In the last step samples
have several media, anywhere in their texts, some are the second span of the one before, and the
ranks hold different numbers of them.
"""


def make_pack(names: list[str], number: int) -> PackedBatch:
    """One sample of each name (`a+b`: several media), drawn from `number`; none: an empty pack."""
    generator = torch.Generator().manual_seed(number)
    kinds = all_modalities()
    spans = [tuple(name.split("+")) for name in names]
    flat = [name for own in spans for name in own]
    values = {
        m: torch.randn((flat.count(m), *kind.value_shape), generator=generator)
        for m, kind in kinds.items()
    }
    if not names:
        return PackedBatch(
            torch.tensor([1]),
            torch.tensor([IGNORE]),
            (1,),
            ((),),
            values,
            torch.zeros(1),
            is_empty=True,
        )
    ids = torch.randint(3, 300, (len(names), TOKENS), generator=generator)
    ids[:, 0] = 1
    labels = ids.clone()
    labels[:, 0] = IGNORE
    return PackedBatch(
        ids.flatten(),
        labels.flatten(),
        (TOKENS,) * len(names),
        tuple(spans),
        values,
        torch.ones(len(names)),
        tuple(f"s{number}-{i}" for i in range(len(names))),
        places=tuple(
            tuple(sorted(torch.randint(1, TOKENS + 1, (len(own),), generator=generator).tolist()))
            for own in spans
        )
        if len(flat) > len(names)
        else (),
        span_numbers=tuple(tuple(map(int, _are_second(own))) for own in spans)
        if len(flat) > len(names)
        else (),
    )


def _are_second(spans: Sequence[str]) -> list[bool]:
    """Whether each span is the second of its medium: one that follows a span of its modality."""
    return [before == own for before, own in itertools.pairwise(("", *spans))]


def step_packs(step: int) -> list[list[PackedBatch]]:
    """[rank][micro-batch]; the shorter rank is filled up with empty ones."""
    count = max(len(rank) for rank in ASSIGNED[step])
    return [
        [
            make_pack(names, 100 * step + 10 * r + i)
            for i, names in enumerate([*rank, *[[]] * (count - len(rank))])
        ]
        for r, rank in enumerate(ASSIGNED[step])
    ]


def global_valid_tokens(step: int) -> int:
    return sum(int((pack.labels != IGNORE).sum()) for rank in step_packs(step) for pack in rank)


def split_pack(pack: PackedBatch) -> Iterator[PackedBatch]:
    """The samples of a pack, each alone."""
    ids, labels = (t.split(pack.text_token_counts) for t in (pack.input_ids, pack.labels))
    used: Counter[str] = Counter()
    for i, spans in enumerate(pack.modalities):
        own = Counter(spans)
        values = {n: v[used[n] : used[n] + own[n]] for n, v in pack.values.items()}
        used += own
        yield PackedBatch(
            ids[i],
            labels[i],
            pack.text_token_counts[i : i + 1],
            (spans,),
            values,
            pack.weights[i : i + 1],
            pack.sample_ids[i : i + 1],
            places=pack.places[i : i + 1],
            span_numbers=pack.span_numbers[i : i + 1],
        )


def new_model() -> torch.nn.Module:
    is_toy = sys.argv[2] == "toy"
    config = build_config("toy") if is_toy else build_small_config([*MIXTURE, "depth"])
    config.span_positions = "learned"
    model: torch.nn.Module = OneLLMForConditionalGeneration(config)
    initialise(model, 3)
    freeze_for_stage(model, "align", MIXTURE)
    model.train()
    return model


def train_sharded(dist: Distributed, name: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = new_model()
    fsdp = name == "fsdp"
    settings = EngineSettings(
        world_size=dist.world_size,
        device=dist.device,
        bf16=False,
        optimizer=make_optimizer(OptimSection(lr=LR)),
        grad_clip=CLIP,
        options=FsdpOptions() if fsdp else load_ds_config(Path(name)),
        parts={n: n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad},
    )
    engine = (
        get_engine("fsdp" if fsdp else "deepspeed")
        .load()
        .wrap(model, make_groups(model, DECAY), settings)
    )
    losses = []
    for step in range(len(ASSIGNED)):
        packs = step_packs(step)[dist.rank]
        total = torch.zeros(1)
        for i, pack in enumerate(packs):
            loss, _, _ = engine.forward(pack, last=i == len(packs) - 1)
            engine.backward(loss, global_valid_tokens(step))
            total += loss.detach()
        dist.sum(total)
        assert engine.step(LR)
        losses.append(total.item() / global_valid_tokens(step))
    return gather_full_state(engine), losses


def train_plain() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Train with plain torch on each sample of all ranks alone; what is absent has no gradient."""
    model = new_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(make_groups(model, DECAY), lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(len(ASSIGNED)):
        optimizer.zero_grad()
        total = 0.0
        for pack in (pack for rank in step_packs(step) for pack in rank if not pack.is_empty):
            for sample in split_pack(pack):
                loss = model(packed=sample).loss / global_valid_tokens(step)
                loss.backward()
                total += float(loss.detach())
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        losses.append(total)
    return before, {n: p.detach() for n, p in model.named_parameters()}, losses


def compare(
    found: dict[str, torch.Tensor], losses: list[float], right: tuple[Any, Any, list[float]]
) -> dict[str, Any]:
    before, expected, right_losses = right
    names = [n for n, p in new_model().named_parameters() if p.requires_grad]
    errors = {}
    for part in sorted({".".join(n.split(".")[:2]) for n in names}):
        own = [n for n in names if n.startswith(part)]
        gap = sum(float((found[n] - expected[n]).square().sum()) for n in own) ** 0.5
        errors[part] = (
            gap / sum(float((expected[n] - before[n]).square().sum()) for n in own) ** 0.5
        )
    return {
        "losses": max(abs(a - b) for a, b in zip(losses, right_losses, strict=True)),
        "errors": errors,
        "unmoved": [n for n in names if torch.equal(found[n], before[n])],
        "frozen": all(torch.equal(found[n], before[n]) for n in before if n not in names),
    }


def main() -> None:
    end_with_parent()
    ranks = discover_ranks()
    assert ranks is not None
    torch.set_num_threads(1)
    dist = join(ranks)
    results = {}
    for name in sys.argv[3:]:
        results[name] = train_sharded(dist, name)
    if dist.is_rank_zero:
        right = train_plain()
        found = {name: compare(state, losses, right) for name, (state, losses) in results.items()}
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
    leave()
    os._exit(0)


if __name__ == "__main__":
    main()
