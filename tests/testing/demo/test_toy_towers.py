"""The toy CLIP: its patches are the encoder's, its loss knows duplicates, and it learns."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_captions import parse_caption

from onellm_dist.modalities import get_modality
from onellm_dist.model.presets import load_model
from onellm_dist.shards.sources.toyworld import world
from onellm_dist.shards.sources.toyworld.render import render_sample
from onellm_dist.testing.demo.toy_clip import (
    ClipPretraining,
    ContrastiveHead,
    ImageBank,
    compute_contrastive_loss,
    encode_patches,
    make_sincos_positions,
    measure_top1,
    prepare_encoder,
    pretrain_clip,
)
from onellm_dist.testing.demo.toy_towers import assemble


@pytest.fixture(scope="module")
def bank() -> ImageBank:
    return ImageBank("pretrain", 250, seed=5)


@pytest.mark.seconds
def test_patches_and_positions_are_the_encoders_own(bank: ImageBank) -> None:
    """Pretraining sees exactly what align sees: the encoder over the modality's transform."""
    model, _ = load_model(path=None, preset="toy", seed=1)
    modality = get_modality("image")
    values = []
    for i in range(3):
        picture = Image.open(io.BytesIO(render_sample("image", "pretrain", i, 5).parts["jpg"]))
        values.append(
            modality.transform(picture.convert("RGB"), train=False, rng=np.random.default_rng(0))
        )
    with torch.no_grad():
        ours = encode_patches(model.encoder, bank, np.arange(3), None, np.random.default_rng(0))
        theirs = model.encoder.encode_images(torch.stack(values))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_kept_patches_include_everything_that_shows_something(bank: ImageBank) -> None:
    assert int(bank.busy.sum(axis=1).min()) >= 3
    model, _ = load_model(path=None, preset="toy", seed=1)
    busy = int(bank.busy[7].sum())
    with torch.no_grad():
        kept = encode_patches(model.encoder, bank, np.array([7]), busy, np.random.default_rng(0))
        again = encode_patches(model.encoder, bank, np.array([7]), busy, np.random.default_rng(9))
    assert kept.shape == (1, busy + 1, 96)
    # Whatever is drawn, the busy patches come first: the class token's output is the same.
    torch.testing.assert_close(kept[:, 0], again[:, 0], atol=1e-5, rtol=1e-4)


def test_half_of_a_hard_batch_shares_colour_and_size(bank: ImageBank) -> None:
    rows = next(bank.draw_hard_batches(8, np.random.default_rng(0)))
    assert len(rows) == 8
    captions = [parse_caption("image", bank.captions[i]) for i in rows[:4]]
    assert len({(s["color"], s["size"]) for s in captions}) == 1


def test_bank_holds_no_held_out_combination(bank: ImageBank) -> None:
    held = {
        world.make_caption("image", world.to_attributes("image", c))
        for c in world.get_held_out("image")
    }
    assert not held & set(bank.captions)


def test_contrastive_loss_counts_every_pair_of_one_caption_as_right() -> None:
    flat = torch.zeros(4, 4)
    assert compute_contrastive_loss(flat, torch.tensor([0, 1, 2, 3])).item() == pytest.approx(
        math.log(4)
    )
    caption_ids = torch.tensor([0, 0, 1, 2])
    right = (caption_ids[:, None] == caption_ids[None]).float()
    # Two equal captions share the probability: the best that they can reach is log 2.
    best = compute_contrastive_loss(50 * right, caption_ids).item()
    assert best == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_positions_of_patches_differ_and_neighbours_are_alike() -> None:
    positions = make_sincos_positions(96)
    assert positions.shape == (257, 96) and float(positions[0].abs().sum()) == 0
    likeness = positions[1:] @ positions[1:].T
    here = 8 * 16 + 8
    assert int(likeness[here].argmax()) == here
    assert (
        likeness[here, here + 1] > likeness[here, here + 5]
        and likeness[here, here + 16] > likeness[here, here + 80]
    )


@pytest.mark.seconds
def test_the_assembled_model_has_the_towers(tmp_path: Path) -> None:
    model, _ = load_model(path=None, preset="toy", seed=11)
    prepare_encoder(model.encoder, torch.Generator().manual_seed(0))
    torch.save(model.encoder.state_dict(), tmp_path / "clip.pt")
    torch.save(model.llm.state_dict(), tmp_path / "llm.pt")
    assemble(tmp_path / "clip.pt", tmp_path / "llm.pt", tmp_path / "towers")
    made, processor = load_model(path=tmp_path / "towers", preset=None, seed=0)
    for name, tensor in model.encoder.state_dict().items():
        torch.testing.assert_close(made.encoder.state_dict()[name], tensor, atol=0, rtol=0)
    for name, tensor in model.llm.state_dict().items():
        torch.testing.assert_close(made.llm.state_dict()[name], tensor, atol=0, rtol=0)
    assert len(processor.tokenizer) == made.config.text_config.vocab_size


@pytest.mark.slow
def test_a_short_pretraining_distinguishes_images(bank: ImageBank) -> None:
    model, processor = load_model(path=None, preset="toy", seed=0)
    untrained = ContrastiveHead(96, len(processor.tokenizer))
    before = measure_top1(model.encoder, untrained, processor.tokenizer, bank, batches=2)
    head, losses = pretrain_clip(
        model.encoder,
        processor.tokenizer,
        ClipPretraining(images=2560, bank=250, whole=0.6, warmup=10),
        bank,
    )
    after = measure_top1(model.encoder, head, processor.tokenizer, bank, batches=2)
    assert losses[-1] < 0.8 * losses[0]
    assert before < 0.1 and after > before + 0.1, f"{before} {after} {losses}"
    assert not any(p.requires_grad for p in model.encoder.parameters())
