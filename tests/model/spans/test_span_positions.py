"""Telling the spans of one medium apart: nothing for one span, a row for each of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packs import WORDS, empty_pack, make_pack, relative, small_model

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.media_size import MOST_SPANS
from onellm_dist.common.placeholders import list_medium_spans
from onellm_dist.config.load import load_config
from onellm_dist.diagnostics.preflight.resource_needs import count_parameters
from onellm_dist.modalities import all_modalities
from onellm_dist.model import OneLLMConfig, OneLLMForConditionalGeneration, OneLLMProcessor
from onellm_dist.model.generation.batched import Medium, Prompt, generate_batch
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.presets import build_config, load_toy_tokenizer
from onellm_dist.model.spans.positions import build_fixed_rows
from onellm_dist.model.weights.lazy import open_model
from onellm_dist.packed import PackedBatch
from onellm_dist.planner.run_plan import load_model_config
from onellm_dist.train.start.model import prepare_model

KINDS = ("fixed", "learned")
MODALITIES = ["image", "imu"]


def build(kind: str, *, words: int = WORDS, trained: bool = True) -> Any:
    """The same weights for every kind; learned rows as training would leave them."""
    config = small_model(modalities=MODALITIES, words=words).config
    config.span_positions = kind
    model = OneLLMForConditionalGeneration(config)
    initialise(model, 0)
    if kind == "learned" and trained:
        generator = torch.Generator().manual_seed(1)
        for name in MODALITIES:
            rows = model.get_projector(name).span_positions.weight
            rows.data.normal_(generator=generator)
    return model


def small_pack(spans: list[list[str]], lengths: list[int]) -> PackedBatch:
    pack = make_pack(spans, lengths)
    return replace(pack, values={name: pack.values[name] for name in MODALITIES})


def several_pack() -> PackedBatch:
    """A picture of three spans, a text, and a recording of two between two pictures of one."""
    spans = [["image"] * 3, [], ["image", "imu", "imu", "image"]]
    numbers = ((0, 1, 2), (), (0, 0, 1, 0))
    places = ((1, 1, 1), (), (2, 4, 4, 5))
    return replace(small_pack(spans, [5, 4, 6]), span_numbers=numbers, places=places)


def take_alone(pack: PackedBatch, i: int) -> PackedBatch:
    """The pack of one of the samples of `several_pack`."""
    start = sum(pack.text_token_counts[:i])
    end = start + pack.text_token_counts[i]
    first = {n: sum(s.count(n) for s in pack.modalities[:i]) for n in MODALITIES}
    own = {n: pack.modalities[i].count(n) for n in MODALITIES}
    return replace(
        pack,
        input_ids=pack.input_ids[start:end],
        labels=pack.labels[start:end],
        text_token_counts=(pack.text_token_counts[i],),
        modalities=(pack.modalities[i],),
        values={n: pack.values[n][first[n] : first[n] + own[n]] for n in MODALITIES},
        weights=pack.weights[i : i + 1],
        places=(pack.places[i],),
        span_numbers=(pack.span_numbers[i],),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_span_a_medium_is_the_model_without_bit_for_bit(kind: str) -> None:
    """Forward, padded forward, loss and gradients, also of several media of one modality."""
    pack = small_pack([["image", "image"], [], ["imu", "image"]], [5, 3, 4])
    plain, other = build("none"), build(kind)
    losses = [m(packed=pack).loss for m in (plain, other)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(other.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[name].grad), name
    values = {f"{n}_values": v[:1] for n, v in pack.values.items()}
    with torch.no_grad():
        one, two = (m(pack.input_ids[None, :5], **values).logits for m in (plain, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_span_gets_the_row_of_its_number(kind: str) -> None:
    model = build(kind)
    value = torch.randn(1, 6, 400).expand(3, 6, 400)
    with torch.no_grad():
        plain, _ = model.encode({"imu": value})
        tokens, _ = model.encode({"imu": value}, {"imu": [0, 1, MOST_SPANS - 1]})
    own = (
        build_fixed_rows(MOST_SPANS, plain["imu"].shape[-1])[1:]
        if kind == "fixed"
        else model.get_projector("imu").span_positions.weight
    )
    assert torch.equal(tokens["imu"][0], plain["imu"][0])
    for at, number in ((1, 1), (2, MOST_SPANS - 1)):
        expected = own[number - 1].expand(30, -1)
        assert torch.allclose(tokens["imu"][at] - plain["imu"][at], expected, atol=1e-5)


def test_fixed_rows_differ_from_each_other() -> None:
    rows = build_fixed_rows(MOST_SPANS, 48)
    assert not rows[0].any()
    assert torch.cdist(rows, rows).fill_diagonal_(1e9).min() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone_and_padded(kind: str) -> None:
    """Logits to 1e-5 and gradients to 1e-4, for media of several spans and of one."""
    model, pack = build(kind), several_pack()
    alone = [take_alone(pack, i) for i in range(3)]
    with torch.no_grad():
        together, supervised, _ = model.compute_packed_logits(pack)
        at = 0
        for sample, length in zip(alone, pack.text_token_counts, strict=True):
            own = together[(supervised >= at) & (supervised < at + length)]
            at += length
            assert relative(own, model.compute_packed_logits(sample)[0]) < 1e-5
        ids = pack.input_ids.split(pack.text_token_counts)[2]
        spans = [("image", 2), *list_medium_spans("imu", 4, 2), ("image", 5)]
        values = {f"{n}_values": v for n, v in alone[2].values.items()}
        padded = model(ids[None], labels=ids[None], media_spans=[spans], **values)
        wrong = model(ids[None], labels=ids[None], media_spans=[[s[:2] for s in spans]], **values)
        assert abs(float(padded.loss) * (len(ids) - 1) - float(model(packed=alone[2]).loss)) < 1e-4
        assert relative(padded.logits[0, -1:], wrong.logits[0, -1:]) > 1e-3
    gradients = []
    for packs in ([pack], alone):
        model.zero_grad()
        for each in packs:
            model(packed=each).loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    for name, gradient in gradients[0].items():
        if gradients[1][name].abs().max() > 0:
            assert relative(gradient, gradients[1][name]) < 1e-4, name
    if kind == "learned":
        trained = gradients[0]["projectors.imu.span_positions.weight"].abs().sum(1) > 0
        assert trained.nonzero().flatten().tolist() == [0]  # number 1 alone


def test_a_rank_without_media_has_gradients_of_every_row() -> None:
    """Else the collectives of a sharded model would not match."""
    model = build("learned")
    model(packed=empty_pack()).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "span_positions" in n]
    assert len(grads) == 2 and all(g is not None and not g.any() for g in grads)


def test_generation_in_batches_and_alone_knows_the_numbers() -> None:
    model = build("fixed")
    model.eval()
    values = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(4))
    spans = list_medium_spans("image", 1, 3)
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
    ids = torch.tensor([[1, 9, 11]])
    alone = model.generate(ids, media_spans=[spans], image_values=values, **options)[0, 3:].tolist()
    seen: list[torch.Tensor] = []
    media = [Medium("image", value, f"a {i}", i) for i, value in enumerate(values)]
    (answer,) = generate_batch(
        model,
        [Prompt([1, 9, 11], media, max_new_tokens=6)],
        end_ids=[],
        on_logits=lambda _, logits: seen.append(logits.clone()),
    )
    assert list(answer.tokens) == alone
    first = seen[0]
    seen.clear()
    plain = [replace(m, number=0) for m in media]
    generate_batch(
        model,
        [Prompt([1, 9, 11], plain, max_new_tokens=1)],
        end_ids=[],
        on_logits=lambda _, logits: seen.append(logits.clone()),
    )
    assert relative(seen[0], first) > 1e-3


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[("image", 1, MOST_SPANS)]], f"the number {MOST_SPANS}"),
        ([[("image", 1, -1)]], "the number -1"),
        ([[("image",)]], "a span is"),
    ],
)
def test_wrong_numbers_are_refused(spans: Any, words: str) -> None:
    model = build("none")
    with pytest.raises(UsageError, match=words):
        model(torch.tensor([[1, 5]]), media_spans=spans, image_values=torch.zeros(1, 3, 224, 224))


def test_a_pack_whose_numbers_do_not_fit_is_refused() -> None:
    pack = several_pack()
    with pytest.raises(OneLLMError, match="span numbers"):
        build("none")(packed=replace(pack, span_numbers=pack.span_numbers[:2]))
    with pytest.raises(OneLLMError, match="numbers"):
        build("none").encode({"imu": torch.zeros(2, 6, 400)}, {"imu": [0]})


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(folder)
    return folder


def test_a_saved_model_keeps_them_and_takes_them_up(tmp_path: Path) -> None:
    """A folder remembers its own; one without gets those of the recipe, learned ones at zero."""
    words = len(load_toy_tokenizer())
    own = build("learned", words=words)
    folder = save(own, tmp_path / "own")
    assert OneLLMConfig.from_pretrained(folder).span_positions == "learned"
    name = "projectors.imu.span_positions.weight"
    for kind in (None, "learned"):
        model, _, weights = open_model(path=folder, preset=None, seed=0, span_positions=kind)
        assert model.config.span_positions == "learned"
        assert torch.equal(weights.rows(name, 3, 9), own.get_parameter(name)[3:9])
    with pytest.raises(UsageError, match=r"positions=fixed, but the model has learned"):
        open_model(path=folder, preset=None, seed=0, span_positions="fixed")
    plain = build("none", words=words)
    folder = save(plain, tmp_path / "plain")
    model, _, weights = open_model(path=folder, preset=None, seed=0, span_positions="learned")
    assert model.get_parameter(name).shape == (MOST_SPANS - 1, 48)
    assert torch.equal(weights.rows(name, 2, 5), torch.zeros(3, 48))
    kept = "projectors.imu.queries.weight"
    assert torch.equal(weights.rows(kept, 0, 30), plain.get_parameter(kept))
    _, _, weights = open_model(path=None, preset="toy", seed=0, span_positions="learned")
    assert not weights.rows(name, 0, MOST_SPANS - 1).any()


def test_recipes_bound_the_spans_of_a_sample() -> None:
    for value, fault in (("everywhere", "span_positions"), ("learned", "")):
        given = [f"model.span_positions={value}", "data.spans={image: 128}"]
        if fault:
            with pytest.raises(UsageError, match=fault):
                load_config(Path("toy/align_all"), given)
        else:
            assert load_config(Path("toy/align_all"), given).model.span_positions == value
    with pytest.raises(UsageError, match=r"data\.spans\.image"):
        load_config(Path("toy/align_all"), ["data.spans={image: 129}"])


def test_planner_and_preflight_know_them() -> None:
    counts = []
    for kind in ("none", "fixed", "learned"):
        config = load_config(Path("toy/align_all"), [f"model.span_positions={kind}"])
        assert load_model_config(config).span_positions == kind
        counts.append(count_parameters(config))
    rows = len(all_modalities()) * (MOST_SPANS - 1) * build_config("toy").text_config.hidden_size
    assert counts[0] == counts[1]
    assert [after - before for before, after in zip(counts[0], counts[2], strict=True)] == [
        rows
    ] * 2


def test_new_rows_must_train() -> None:
    """Over a model without them, `tune` would leave them zero."""
    for stage, rule, refused in (
        ("tune", "", True),
        ("align", "", False),
        ("tune", "[{match: projectors.*.span_positions.*}]", False),
    ):
        given = ["model.span_positions=learned", f"train.stage={stage}", "model.init_from_image=[]"]
        config = load_config(
            Path("toy/align_all"), given + [f"train.parameters={rule}"] * bool(rule)
        )
        model, _, weights = open_model(path=None, preset="toy", seed=0, span_positions="learned")
        names = model.config.modalities
        inputs: Any = SimpleNamespace(model=model, modalities=names, all_modalities=names)
        keys: dict[str, Any] = {"inputs": inputs, "weights": weights, "device_type": "cpu"}
        if refused:
            with pytest.raises(UsageError, match="no rule trains the new rows"):
                prepare_model(config, **keys)
        else:
            prepared = prepare_model(config, **keys)
            assert "projectors.audio.span_positions.weight" in prepared.parameters.rates
