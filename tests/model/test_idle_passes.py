"""A pass through the encoder that no rank needs is left out, and no number moves."""

from __future__ import annotations

import pytest
import torch
from packs import empty_pack, make_pack, small_model

from onellm_dist.model import OneLLMForConditionalGeneration
from onellm_dist.model.modality_tokens import TOKENIZED_PASS, VISUAL_PASS, find_idle_passes
from onellm_dist.packed import PackedBatch

MODALITIES = ("image", "imu")


def prepare(present: set[str]) -> OneLLMForConditionalGeneration:
    """A model as a run of these modalities has it: what no sample reaches is frozen."""
    model = small_model(modalities=MODALITIES)
    for owner in (model.tokenizers, model.projectors):
        for name, part in owner.items():
            part.requires_grad_(name in present)
    return model


def run(model: OneLLMForConditionalGeneration, pack: PackedBatch) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients, and how often a block of the encoder ran."""
    calls: list[int] = []
    handle = model.encoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    model.zero_grad()
    out = model(packed=pack)
    out.loss.backward()
    handle.remove()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return [out.loss.detach(), out.nll, *(p.grad for p in trained if p.grad is not None)], len(
        calls
    )


@pytest.mark.parametrize(("present", "idle"), [({"image"}, TOKENIZED_PASS), ({"imu"}, VISUAL_PASS)])
def test_leaving_out_an_empty_pass_moves_no_bit(present: set[str], idle: str) -> None:
    model = prepare(present)
    name = sorted(present)[0]
    for pack in (make_pack([(name,), (), (name,)], [5, 6, 7]), empty_pack()):
        model.idle_passes = frozenset()
        plain, calls = run(model, pack)
        model.idle_passes = find_idle_passes(model, present)
        assert model.idle_passes == {idle}
        skipped, fewer = run(model, pack)
        assert (calls, fewer) == (2, 1)
        assert all(torch.equal(a, b) for a, b in zip(plain, skipped, strict=True))


def test_values_that_come_all_the_same_are_encoded() -> None:
    model = prepare({"image"})
    pack = make_pack([("image",), ("imu",)], [5, 6])
    plain = model(packed=pack).nll
    model.idle_passes = find_idle_passes(model, {"image"})
    assert torch.equal(model(packed=pack).nll, plain)


@pytest.mark.parametrize(
    ("trains", "present", "idle"),
    [
        ("encoder", {"image"}, set()),
        ("tokenizers", {"image"}, set()),
        ("tokenizers", {"imu"}, {VISUAL_PASS}),
        ("upm", {"image", "imu"}, set()),
        ("upm", set(), {VISUAL_PASS, TOKENIZED_PASS}),
    ],
)
def test_a_pass_that_trains_something_is_never_idle(
    trains: str, present: set[str], idle: set[str]
) -> None:
    model = small_model(modalities=MODALITIES).requires_grad_(False)
    model.get_submodule(trains).requires_grad_(True)
    assert find_idle_passes(model, present) == idle
