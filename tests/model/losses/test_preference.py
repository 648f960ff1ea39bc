"""Comparing two answers: packed pairs against each answer alone, and the reference."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from onellm_dist.common.errors import UsageError
from onellm_dist.config.train_sections import DpoSection, LoraSection
from onellm_dist.model.adapters.lora import add_adapters
from onellm_dist.model.losses.preference import list_copies, prepare_preference
from onellm_dist.model.losses.registry import compute_dpo, get_loss, list_losses
from onellm_dist.model.presets import load_model
from onellm_dist.packed import IGNORE, PackedBatch

BETA = 0.3


def make_pairs(*, names: tuple[str, ...] = ("image", "", "imu")) -> PackedBatch:
    """Three pairs of answers of 2 to 5 tokens behind prompts of 3 to 5."""
    drawn = torch.Generator().manual_seed(3)
    ids, labels, counts, chosen = [], [], [], []
    for i in range(len(names)):
        prompt = torch.cat([torch.tensor([1]), torch.randint(3, 400, (2 + i,), generator=drawn)])
        for number in range(2):
            answer = torch.randint(3, 400, (2 + i + number,), generator=drawn)
            ids.append(torch.cat([prompt, answer]))
            labels.append(torch.cat([torch.full_like(prompt, IGNORE), answer]))
        chosen.append(len(ids[-2]))
        counts.append(len(ids[-2]) + len(ids[-1]))
    model_values = {
        "image": torch.randn((names.count("image"), 3, 224, 224), generator=drawn),
        "imu": torch.randn((names.count("imu"), 6, 400), generator=drawn),
    }
    return PackedBatch(
        torch.cat(ids),
        torch.cat(labels),
        tuple(counts),
        tuple((n,) if n else () for n in names),
        model_values,
        torch.ones(len(names)),
        chosen_tokens=tuple(chosen),
    )


def split(batch: PackedBatch) -> list[PackedBatch]:
    """Each answer as a pack of one ordinary sample."""
    found, start, used = [], 0, {"image": 0, "imu": 0}
    for count, chosen, spans in zip(
        batch.text_token_counts, batch.chosen_tokens, batch.modalities, strict=True
    ):
        values = {n: v[:0] for n, v in batch.values.items()}
        for name in spans:
            values[name] = batch.values[name][used[name] : used[name] + 1]
            used[name] += 1
        for size in (chosen, count - chosen):
            ids, labels = (x[start : start + size] for x in (batch.input_ids, batch.labels))
            found.append(PackedBatch(ids, labels, (size,), (spans,), values, torch.ones(1)))
            start += size
    return found


def make_model(section: DpoSection, lora: LoraSection | None) -> Any:
    torch.manual_seed(0)
    model, _ = load_model(path=None, preset="toy", seed=0)
    model.requires_grad_(False)
    if lora is not None:
        add_adapters(model, lora)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("llm.", "upm.", "projectors.")))
    prepare_preference(model, section)
    return model.train()


def disturb(model: Any) -> None:
    """Let what trains move away from where it started."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=drawn))


@pytest.mark.parametrize("reference", ["adapter", "everywhere", "copy"])
@pytest.mark.seconds
def test_packed_pairs_give_what_each_answer_alone_gives(reference: str) -> None:
    adapters = reference != "copy"
    targets = ("llm.*",) if reference == "adapter" else ("llm.*", "encoder.*", "upm.*")
    section = DpoSection(
        beta=BETA, label_smoothing=0.2, reference="adapter" if adapters else "copy"
    )
    model = make_model(section, LoraSection(rank=4, targets=targets) if adapters else None)
    start, _ = load_model(path=None, preset="toy", seed=0)
    batch = make_pairs()
    first = model(packed=batch)
    assert float(first.loss.detach()) == pytest.approx(3 * math.log(2), abs=1e-5)
    disturb(model)
    out = model(packed=batch)
    out.loss.backward()
    plain = copy.copy(model)
    plain.__dict__ = {**model.__dict__, "preference": None}
    scores = [
        torch.tensor([-float(m(packed=one).loss) for one in split(batch)]).reshape(-1, 2)
        for m in (plain, start)
    ]
    rewards = BETA * (scores[0] - scores[1])
    margins = rewards[:, 0] - rewards[:, 1]
    expected = -0.8 * functional.logsigmoid(margins) - 0.2 * functional.logsigmoid(-margins)
    assert torch.allclose(out.rewards, rewards, atol=2e-4)
    assert torch.allclose(out.nll, expected, atol=2e-4)
    assert margins.abs().max() > 0.05, "the model has moved"
    assert out.sample_index.tolist() == [0, 1, 2]
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved and all(p.requires_grad for n, p in model.named_parameters() if n in moved)
    copies = list_copies(model)
    assert bool(copies) == (not adapters)
    assert {n.split(".")[1] for n in copies} == (
        set() if adapters else {"llm", "upm", "projectors"}
    )
    own = dict(start.named_parameters())
    assert all(torch.equal(model.get_parameter(n), own[of]) for n, of in copies.items())


@pytest.mark.seconds
def test_media_are_encoded_once_where_both_models_encode_alike() -> None:
    for targets, passes in ((("llm.*",), 1), (("llm.*", "upm.*"), 2)):
        model = make_model(DpoSection(), LoraSection(rank=2, targets=targets))
        calls: list[int] = []
        handle = model.upm.register_forward_hook(lambda *_, c=calls: c.append(1))
        rows: list[int] = []
        other = model.encoder.patches.register_forward_pre_hook(
            lambda _, inputs, r=rows: r.append(len(inputs[0]))
        )
        model(packed=make_pairs())
        handle.remove()
        other.remove()
        assert len(calls) == passes
        assert rows == [1] * passes, "one picture, though two answers are about it"


@pytest.mark.seconds
def test_a_left_out_pair_and_an_empty_pack_weigh_nothing() -> None:
    model = make_model(DpoSection(beta=BETA), LoraSection(rank=2))
    disturb(model)
    batch = make_pairs()
    labels = batch.labels.clone()
    labels[: batch.text_token_counts[0]] = IGNORE
    skipped = PackedBatch(
        batch.input_ids,
        labels,
        batch.text_token_counts,
        batch.modalities,
        batch.values,
        torch.tensor([0.0, 1.0, 1.0]),
        chosen_tokens=batch.chosen_tokens,
    )
    whole, left = model(packed=batch), model(packed=skipped)
    assert float(left.loss.detach()) == pytest.approx(float(whole.nll[1:].sum()), abs=1e-5)
    values = {n: v[:0] for n, v in batch.values.items()}
    empty = PackedBatch(
        torch.tensor([1]),
        torch.tensor([IGNORE]),
        (1,),
        ((),),
        values,
        torch.zeros(1),
        is_empty=True,
        chosen_tokens=(0,),
    )
    out = model(packed=empty)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0


def test_a_reference_that_would_move_is_refused() -> None:
    model, _ = load_model(path=None, preset="toy", seed=0)
    model.requires_grad_(False)
    add_adapters(model, LoraSection(rank=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith("upm."))
    with pytest.raises(UsageError, match="not adapters: upm"):
        prepare_preference(model, DpoSection())


def test_the_loss_is_that_of_the_paper() -> None:
    margins = torch.tensor([0.0, 1.5, -40.0])
    assert torch.allclose(
        compute_dpo(margins, 0.0), -torch.log(torch.sigmoid(margins.double())).float()
    )
    smoothed = 0.9 * compute_dpo(margins, 0.0) + 0.1 * compute_dpo(-margins, 0.0)
    assert torch.allclose(compute_dpo(margins, 0.1), smoothed)
    assert "dpo" in list_losses()
    with pytest.raises(UsageError, match="dpo"):
        get_loss("nothing")
