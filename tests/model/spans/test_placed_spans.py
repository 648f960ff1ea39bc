"""Media anywhere in texts: packed equals each sample alone, and alone equals plain embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packs import make_pack, relative, small_model

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.modalities import SPAN_TOKENS, all_modalities
from onellm_dist.model import OneLLMForConditionalGeneration
from onellm_dist.model.spans.layout import PackedLayout
from onellm_dist.packed import PackedBatch

CHEAP = ("point", "imu", "fmri", "image", "audio")
"""Modalities whose encoder sequences are few."""


@pytest.fixture(scope="module")
def model() -> OneLLMForConditionalGeneration:
    model = small_model()
    model.train(False)
    return model


def placed_pack(
    spans: list[list[str]], lengths: list[int], places: list[list[int]], seed: int = 0
) -> PackedBatch:
    pack = make_pack(spans, lengths, seed)
    return replace(pack, places=tuple(tuple(sorted(p)) for p in places))


def take_alone(pack: PackedBatch, i: int) -> PackedBatch:
    """The pack of one of its samples."""
    start = sum(pack.text_token_counts[:i])
    end = start + pack.text_token_counts[i]
    before = Counter(name for spans in pack.modalities[:i] for name in spans)
    own = Counter(pack.modalities[i])
    return PackedBatch(
        pack.input_ids[start:end],
        pack.labels[start:end],
        (pack.text_token_counts[i],),
        (pack.modalities[i],),
        {n: v[before[n] : before[n] + own[n]] for n, v in pack.values.items()},
        pack.weights[i : i + 1],
        places=(pack.places[i],) if pack.places else (),
    )


def compute_gradients(
    model: OneLLMForConditionalGeneration, packs: list[PackedBatch]
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for pack in packs:
        model(packed=pack).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


Mixture = tuple[list[list[str]], list[int], list[list[int]]]


@st.composite
def mixtures(draw: st.DrawFn, names: Sequence[str] = CHEAP[:4]) -> Mixture:
    samples = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 9), min_size=samples, max_size=samples))
    spans, places = [], []
    for length in lengths:
        own = draw(st.lists(st.sampled_from(names), max_size=6))
        spans.append(own)
        places.append([draw(st.integers(1, length)) for _ in own])
    return spans, lengths, places


@given(mixtures())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.seconds
def test_packed_equals_each_sample_alone(
    model: OneLLMForConditionalGeneration, mixture: Mixture
) -> None:
    check_logits(model, mixture)


@pytest.mark.soak
@given(mixtures(tuple(all_modalities())))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_packed_equals_each_sample_alone_for_all_modalities(
    model: OneLLMForConditionalGeneration, mixture: Mixture
) -> None:
    check_logits(model, mixture)


def check_logits(model: OneLLMForConditionalGeneration, mixture: Mixture) -> None:
    """0 to 6 media a sample anywhere: logits to 1e-5, and nothing of the neighbours in them."""
    spans, lengths, places = mixture
    pack = placed_pack(spans, lengths, places)
    with torch.no_grad():
        packed, supervised, _ = model.compute_packed_logits(pack)
        start = 0
        for i, length in enumerate(lengths):
            alone, _, _ = model.compute_packed_logits(take_alone(pack, i))
            own = packed[(supervised >= start) & (supervised < start + length)]
            start += length
            assert own.shape == alone.shape
            if len(own):
                assert relative(own, alone) < 1e-5


@pytest.mark.slow
def test_gradients_are_those_of_the_samples_alone() -> None:
    """Of all modalities, 0 to 6 media a sample; logits too."""
    model = small_model()
    spans = [
        ["image", "image", "imu"],
        [],
        ["fmri", "image", "fmri", "point", "audio", "image"],
        ["video", "depth", "normal", "audio"],
    ]
    places = [[1, 4, 6], [], [1, 1, 3, 7, 9, 9], [2, 2, 3, 5]]
    check_logits(model, (spans, [6, 4, 9, 5], places))
    pack = placed_pack(spans, [6, 4, 9, 5], places)
    together = compute_gradients(model, [pack])
    alone = compute_gradients(model, [take_alone(pack, i) for i in range(4)])
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        if alone[name].abs().max() > 0:
            assert relative(gradient, alone[name]) < 1e-4, name


def test_the_layout_is_the_text_with_spans_at_their_places() -> None:
    """Against a plain construction, position by position."""
    rng = np.random.default_rng(0)
    known = list(all_modalities())
    for _ in range(60):
        lengths = rng.integers(1, 8, int(rng.integers(1, 5))).tolist()
        spans = [rng.choice(known, int(rng.integers(0, 5))).tolist() for _ in lengths]
        places = [
            sorted(rng.integers(1, length + 1, len(own)).tolist())
            for own, length in zip(spans, lengths, strict=True)
        ]
        layout = PackedLayout.build(lengths, spans, known, places)
        text = 0
        used: Counter[str] = Counter()
        expected: list[int] = []
        predictor: list[int] = []
        counts = Counter(name for own in spans for name in own)
        first = np.cumsum([sum(lengths), *(30 * counts[name] for name in known)])
        for length, own, at in zip(lengths, spans, places, strict=True):
            start = len(expected)
            for token in range(length):
                predictor.append(max(start, len(expected) - 1))
                expected.append(text + token)
                for name, place in zip(own, at, strict=True):
                    if place == token + 1:
                        k = known.index(name)
                        row = first[k] + 30 * used[name]
                        expected += [
                            first[-1] + 2 * k,
                            *range(row, row + 30),
                            first[-1] + 2 * k + 1,
                        ]
                        used[name] += 1
            text += length
        assert layout.gather.tolist() == expected
        assert layout.predictor.tolist() == predictor
        assert sum(layout.lengths) == len(expected) == text + SPAN_TOKENS * counts.total()


def test_behind_bos_is_the_layout_without_places(model: OneLLMForConditionalGeneration) -> None:
    spans, lengths = [["image", "imu"], [], ["fmri"]], [5, 3, 4]
    known = list(all_modalities())
    plain = PackedLayout.build(lengths, spans, known)
    placed = PackedLayout.build(lengths, spans, known, [[1, 1], [], [1]])
    assert plain.gather.tolist() == placed.gather.tolist()
    assert plain.predictor.tolist() == placed.predictor.tolist()


@pytest.mark.parametrize("places", [[[0]], [[6]], [[1, 1]], [[2], [1]], [[]]])
def test_a_place_outside_the_text_is_refused(places: list[list[int]]) -> None:
    with pytest.raises(OneLLMError, match="places the spans"):
        PackedLayout.build([5], [["image"]], ["image"], places)


def test_a_padded_batch_equals_its_packs(model: OneLLMForConditionalGeneration) -> None:
    """Texts of different lengths and numbers of spans, padded on either side: forward, loss."""
    spans = [["image", "imu", "image"], [], ["fmri"]]
    lengths, places = [6, 3, 5], [[1, 3, 6], [], [4]]
    pack = placed_pack(spans, lengths, places)
    longest = max(lengths)
    placed = [
        list(zip(s, p, strict=True)) for s, p in zip(pack.modalities, pack.places, strict=True)
    ]
    values = {f"{n}_values": v for n, v in pack.values.items() if len(v)}
    for left in (True, False):
        ids = torch.zeros((3, longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for i, own in enumerate(pack.input_ids.split(lengths)):
            where = slice(longest - len(own), longest) if left else slice(0, len(own))
            ids[i, where], mask[i, where], labels[i, where] = own, 1, own
        with torch.no_grad():
            out = model(ids, mask, labels, media_spans=placed, **values)
            total = sum(float(model(packed=take_alone(pack, i)).loss) for i in range(3))
            assert abs(float(out.loss) * sum(n - 1 for n in lengths) - total) < 1e-3
            one = model(
                ids[:1, :6] if not left else ids[:1, -6:],
                media_spans=placed[:1],
                image_values=pack.values["image"],
                imu_values=pack.values["imu"],
            ).logits
        width = SPAN_TOKENS * 3 + longest
        assert out.logits.shape[:2] == (3, width)
        assert relative(out.logits[0, -one.shape[1] :], one[0]) < 1e-5


def test_generation_continues_a_text_with_media_inside(
    model: OneLLMForConditionalGeneration,
) -> None:
    """A batch of unequal rows gives each row's own answer."""
    spans, lengths, places = [["image", "image"], ["imu"]], [6, 4], [[2, 5], [1]]
    pack = placed_pack(spans, lengths, places, seed=3)
    placed = [
        list(zip(s, p, strict=True)) for s, p in zip(pack.modalities, pack.places, strict=True)
    ]
    texts = pack.input_ids.split(lengths)
    ids = torch.stack([texts[0], torch.cat([torch.zeros(2, dtype=torch.int64), texts[1]])])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None, "do_sample": False}
    image, imu = pack.values["image"], pack.values["imu"]
    both = model.generate(
        ids, mask, media_spans=placed, image_values=image, imu_values=imu, **options
    )
    first = model.generate(texts[0][None], media_spans=placed[:1], image_values=image, **options)
    second = model.generate(texts[1][None], media_spans=placed[1:], imu_values=imu, **options)
    assert both[0, 6:].tolist() == first[0, 6:].tolist()
    assert both[1, 6:].tolist() == second[0, 4:].tolist()


def test_spans_behind_bos_are_the_default(model: OneLLMForConditionalGeneration) -> None:
    pack = make_pack([["image", "imu"]], [6])
    values = {f"{n}_values": v for n, v in pack.values.items() if len(v)}
    with torch.no_grad():
        plain = model(pack.input_ids[None], **values).logits
        placed = model(
            pack.input_ids[None], media_spans=[[("image", 1), ("imu", 1)]], **values
        ).logits
    assert torch.equal(plain, placed)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[("image", 1)], []], "2 rows for 1 text"),
        ([[("image", 0)]], "in a text of 4 tokens"),
        ([[("image", 5)]], "in a text of 4 tokens"),
        ([[("image", 2), ("image", 1)]], "in a text of 4 tokens"),
        ([[("image", 1)] * 2], "2 spans and 1 value of image"),
        ([[("imu", 1)]], "0 spans and 1 value of image; 1 span and 0 values of imu"),
    ],
)
def test_spans_that_do_not_fit_are_refused(
    model: OneLLMForConditionalGeneration, spans: list[list[tuple[str, int]]], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        model(
            torch.tensor([[1, 5, 6, 7]]),
            media_spans=spans,
            image_values=torch.zeros(1, 3, 224, 224),
        )
