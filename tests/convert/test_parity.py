"""The reference's own numbers (tests/fixtures/parity), met by a model that was converted.

Image, audio and point were recorded from the reference. All eight modalities are checked against
`plain_forward.py`, which the recorded numbers check in turn.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.names.reference import MODALITIES
from onellm_dist.modalities import all_modalities
from onellm_dist.modalities.transforms.cloud_sampling import (
    find_nearest_neighbours,
    sample_farthest_points,
)
from onellm_dist.model import OneLLMForConditionalGeneration
from onellm_dist.model.modality_tokens import compute_features
from onellm_dist.packed import PackedBatch

TESTS = Path(__file__).parent.parent
DATA = TESTS / "fixtures" / "parity"
RECORDED = ("image", "audio", "point")
HEADS = 4
TOLERANCE = 1e-4
THEIRS = {ours: theirs for theirs, ours in MODALITIES.items()}

Tensors = dict[str, torch.Tensor]


def import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


plain = import_file(Path(__file__).with_name("plain_forward.py"))


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return cast(Tensors, import_file(DATA / "weights.py").weights(DATA / "manifest.json"))


@pytest.fixture(scope="module")
def model(
    weights: Tensors, tmp_path_factory: pytest.TempPathFactory
) -> OneLLMForConditionalGeneration:
    folder = tmp_path_factory.mktemp("reference")
    torch.save(weights, folder / "consolidated.00-of-01.pth")
    options = ConversionOptions(encoder_heads=HEADS, upm_heads=HEADS, llm_heads=HEADS)
    source = folder / "consolidated.00-of-01.pth"
    convert("reference", source, folder / "out", options=options, quiet=True)
    model: OneLLMForConditionalGeneration = OneLLMForConditionalGeneration.from_pretrained(
        folder / "out"
    )
    model.train(mode=False)
    return model


@pytest.fixture(scope="module")
def inputs() -> Tensors:
    """The recorded inputs; random ones for the modalities that were not recorded."""
    recorded = load_file(DATA / "inputs.safetensors")
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn((1, *m.value_shape), generator=generator)
        for name, m in all_modalities().items()
    }
    return {**drawn, **recorded}


@pytest.fixture(scope="module")
def outputs() -> Tensors:
    return load_file(DATA / "outputs.safetensors")


def off(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    assert reference.std() > 0.01, "these numbers would be met by zeros"
    return (ours - reference).abs().max().item()


def features(model: OneLLMForConditionalGeneration, name: str, value: torch.Tensor) -> torch.Tensor:
    """The encoder's output for a modality: [n, L + 1, D]."""
    return compute_features(model, {name: value})[name]


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
@pytest.mark.seconds
def test_recorded_numbers(
    model: OneLLMForConditionalGeneration, inputs: Tensors, outputs: Tensors, name: str
) -> None:
    tokens, _ = model.encode({name: inputs[name]})
    projector = model.get_projector(name)
    logits = model(inputs["examples"], **{f"{name}_values": inputs[name]}).logits
    assert (
        off(features(model, name, inputs[name]).mean(1), outputs[f"{name}.clip_out_mean"])
        < TOLERANCE
    )
    assert (
        off(
            projector.router.compute_logits(projector.queries())[None],
            outputs[f"{name}.router_logits30"],
        )
        < TOLERANCE
    )
    assert off(tokens[name], outputs[f"{name}.modality_tokens"]) < TOLERANCE
    assert off(logits[:, 32:, :256], outputs[f"{name}.logits_first256"]) < TOLERANCE


@torch.no_grad()
def test_recorded_text(
    model: OneLLMForConditionalGeneration, inputs: Tensors, outputs: Tensors
) -> None:
    assert (
        off(model(inputs["examples"]).logits[..., :256], outputs["text.logits_first256"])
        < TOLERANCE
    )


def test_recorded_groups_of_points(inputs: Tensors, outputs: Tensors) -> None:
    colours = inputs["point"][..., 3:6].contiguous()
    centres = sample_farthest_points(colours, 1024)
    assert torch.equal(centres, outputs["point.fps_idx"].long())
    assert torch.equal(
        find_nearest_neighbours(colours, centres[:, :8], 32), outputs["point.knn_idx_first8"].long()
    )


@torch.no_grad()
def test_packed_logits_are_the_reference_s_too(
    model: OneLLMForConditionalGeneration, inputs: Tensors, outputs: Tensors
) -> None:
    """All recorded modalities and the text in one pack.

    Row t of the reference's logits predicts text token t + 1.
    """
    ids = inputs["examples"][0]
    samples = [(name,) for name in RECORDED] + [()]
    labels = torch.where(torch.arange(len(ids)) == 0, -100, ids)
    values = {
        name: inputs[name] if name in RECORDED else inputs[name][:0] for name in all_modalities()
    }
    pack = PackedBatch(
        ids.repeat(4), labels.repeat(4), (len(ids),) * 4, tuple(samples), values, torch.ones(4)
    )
    logits, _, _ = model.compute_packed_logits(pack)
    reference = torch.cat(
        [outputs[f"{name}.logits_first256"][0, :-1] for name in (*RECORDED, "text")]
    )
    assert off(logits[:, :256], reference) < TOLERANCE


@pytest.mark.parametrize("name", list(all_modalities()))
@torch.no_grad()
@pytest.mark.seconds
def test_every_modality_against_the_plain_forward(
    model: OneLLMForConditionalGeneration,
    weights: Tensors,
    inputs: Tensors,
    outputs: Tensors,
    name: str,
) -> None:
    theirs, value, ids = THEIRS[name], inputs[name], inputs["examples"]
    reference = plain.modality_tokens(theirs, value[0], weights, HEADS, HEADS)
    logits = plain.llama(plain.llm_input(ids[0], [(theirs, reference)], weights), weights, HEADS)
    assert (
        off(features(model, name, value)[0], plain.clip_features(theirs, value[0], weights, HEADS))
        < TOLERANCE
    )
    assert off(model.encode({name: value})[0][name][0], reference) < TOLERANCE
    assert off(model(ids, **{f"{name}_values": value}).logits[0], logits) < TOLERANCE
    if name in RECORDED:  # the plain forward is right itself
        assert off(reference, outputs[f"{name}.modality_tokens"][0]) < TOLERANCE
        assert off(logits[32:, :256], outputs[f"{name}.logits_first256"][0]) < TOLERANCE


@torch.no_grad()
def test_two_modalities_in_a_chosen_order(
    model: OneLLMForConditionalGeneration, weights: Tensors, inputs: Tensors
) -> None:
    order = ["imu", "depth"]
    spans = [
        (THEIRS[m], plain.modality_tokens(THEIRS[m], inputs[m][0], weights, HEADS, HEADS))
        for m in order
    ]
    reference = plain.llama(plain.llm_input(inputs["examples"][0], spans, weights), weights, HEADS)
    values = {f"{m}_values": inputs[m] for m in order}
    ours = model(inputs["examples"], modality_order=order, **values).logits[0]
    assert off(ours, reference) < TOLERANCE
    assert off(model(inputs["examples"], **values).logits[0], reference) > TOLERANCE, (
        "the order must matter"
    )


def test_the_loss_is_the_references(
    model: OneLLMForConditionalGeneration, weights: Tensors, inputs: Tensors
) -> None:
    """Mean over targets; the reference ignores label 0, which is our IGNORE."""
    ids, labels = inputs["examples"], inputs["labels"]
    tokens = plain.modality_tokens("image", inputs["image"][0], weights, HEADS, HEADS)
    logits = plain.llama(plain.llm_input(ids[0], [("image", tokens)], weights), weights, HEADS)[32:]
    reference = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=0)
    with torch.no_grad():
        ours = model(
            ids, labels=torch.where(labels == 0, -100, labels), image_values=inputs["image"]
        ).loss
    assert abs(ours - reference) < TOLERANCE


@torch.no_grad()
def test_decoding_with_the_references_offset(
    model: OneLLMForConditionalGeneration, weights: Tensors, inputs: Tensors
) -> None:
    """The reference decodes from cache position 30 + S where 32 + S are filled: two are lost."""
    prompt = inputs["examples"][:, :7]
    tokens = plain.modality_tokens("image", inputs["image"][0], weights, HEADS, HEADS)
    prefix = plain.llm_input(prompt[0], [("image", tokens)], weights)
    expected = {}
    for mode, kept in (("correct", prefix), ("reference", prefix[:-2])):
        words = [int(plain.llama(prefix, weights, HEADS)[-1].argmax())]
        while len(words) < 6:
            text = torch.cat([kept, weights["llma.tok_embeddings.weight"][torch.tensor(words)]])
            words.append(int(plain.llama(text, weights, HEADS)[-1].argmax()))
        expected[mode] = words
    assert expected["correct"] != expected["reference"], "this prompt would not tell them apart"
    for mode, words in expected.items():
        out = model.generate(
            prompt,
            image_values=inputs["image"],
            decode_offset=mode,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )
        assert out[0].tolist() == [*prompt[0].tolist(), *words]
