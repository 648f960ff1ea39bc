"""Answers in batches: the tokens that each prompt gets alone, whatever stands beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from llm_families import tiny_config
from packs import WORDS, small_model

from onellm_dist.common.errors import UsageError
from onellm_dist.model import OneLLMConfig, OneLLMForConditionalGeneration
from onellm_dist.model.configuration import OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.generation.batched import (
    BatchStatistics,
    Prompt,
    generate_batch,
    split_batches,
)
from onellm_dist.model.generation.media_cache import MediaCache, Medium
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.llm.probe import GAINS, build_llm, own_context

# transformers renames arguments, and warns where an old name is used.
pytestmark = pytest.mark.filterwarnings("error::FutureWarning")
NEW = 9


@pytest.fixture(scope="module")
def model() -> OneLLMForConditionalGeneration:
    """Large weights, so that what a text says next depends on all that came before."""
    model = small_model(modalities=["image", "imu"])
    model.train(mode=False)
    with torch.no_grad():
        for name, p in model.llm.named_parameters():
            if "proj" in name:
                p.mul_(2.5)
    return model


def make_prompts(count: int = 18) -> list[Prompt]:
    """Texts of 1 to 40 tokens; some share their picture with the one before."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(3, 3, 224, 224, generator=generator)
    motions = torch.randn(3, 6, 400, generator=generator)
    prompts = []
    for i in range(count):
        ids = [1, *torch.randint(3, WORDS, (i * 13 % 40,), generator=generator).tolist()]
        media = []
        if i % 4:
            media.append(Medium("image", pictures[i % 3], f"picture {i % 3}"))
        if i % 4 == 2:
            media.append(Medium("imu", motions[i % 3], f"motion {i % 3}"))
        prompts.append(Prompt(ids, media, max_new_tokens=NEW, seed=i))
    return prompts


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts()


def tokens_alone(
    model: OneLLMForConditionalGeneration, prompts: Sequence[Prompt]
) -> list[tuple[int, ...]]:
    """The greedy tokens of transformers' own `generate`, one prompt at a time."""
    found = []
    for prompt in prompts:
        values: dict[str, Any] = {
            f"{m.modality}_values": m.value[None]  # type: ignore[index]  # a tensor here
            for m in prompt.media
        }
        out = model.generate(
            torch.tensor([list(prompt.ids)]),
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            **values,
        )
        found.append(tuple(out[0, len(prompt.ids) :].tolist()))
    return found


@pytest.fixture(scope="module")
def alone(model: OneLLMForConditionalGeneration, prompts: list[Prompt]) -> list[tuple[int, ...]]:
    found = tokens_alone(model, prompts)
    assert len(set(found)) == len(found), "prompts that get the same answer test nothing"
    return found


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.seconds
def test_a_batch_changes_no_token(
    model: OneLLMForConditionalGeneration,
    prompts: list[Prompt],
    alone: list[tuple[int, ...]],
    batch: int,
    reuse: bool,
) -> None:
    if not reuse:
        prompts = [replace(p, media=[replace(m, key=None) for m in p.media]) for p in prompts]
    cache, statistics = MediaCache(), BatchStatistics()
    found = generate_batch(
        model, prompts, end_ids=[], batch=batch, media_cache=cache, statistics=statistics
    )
    assert [c.tokens for c in found] == alone
    assert {c.ended for c in found} == {"length"}
    spans = sum(len(p.media) for p in prompts)
    assert (cache.encoded, cache.reused) == ((6, spans - 6) if reuse else (spans, 0))
    assert statistics.prompts == len(prompts) and statistics.new_tokens == NEW * len(prompts)
    assert statistics.batches == -(-len(prompts) // batch)
    assert (statistics.padding_share == 0) == (batch == 1)


def test_an_llm_that_cannot_be_batched_answers_one_at_a_time(
    model: OneLLMForConditionalGeneration,
    prompts: list[Prompt],
    alone: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "llm_support", replace(model.llm_support, cached=False))
    found = generate_batch(model, prompts[:7], end_ids=[])
    assert [c.tokens for c in found] == alone[:7]
    end = alone[3][4]
    ended = generate_batch(model, prompts[3:4], end_ids=[end])
    assert ended[0].tokens == alone[3][: alone[3].index(end) + 1] and ended[0].ended == "eos"


def test_rows_end_by_themselves_and_the_others_go_on(
    model: OneLLMForConditionalGeneration, prompts: list[Prompt], alone: list[tuple[int, ...]]
) -> None:
    ends = {alone[0][0], alone[5][3]}
    shorter = [replace(p, max_new_tokens=1 + i % NEW) for i, p in enumerate(prompts)]
    heard: dict[int, list[int]] = {}
    found = generate_batch(
        model,
        shorter,
        end_ids=sorted(ends),
        stop=lambda place, tokens: place == 7 and len(tokens) == 2,
        on_token=lambda place, token: heard.setdefault(place, []).append(token),
    )
    for i, (got, expected) in enumerate(zip(found, alone, strict=True)):
        cut = next((j + 1 for j, t in enumerate(expected) if t in ends), NEW + 1)
        most = 2 if i == 7 else 1 + i % NEW
        assert got.tokens == expected[: min(cut, most)]
        assert got.ended == ("eos" if cut <= most else "stop string" if i == 7 else "length")
    assert {place: tuple(tokens) for place, tokens in heard.items()} == {
        i: c.tokens for i, c in enumerate(found)
    }
    assert {"eos", "stop string", "length"} == {c.ended for c in found}


def test_draws_do_not_depend_on_the_batch(
    model: OneLLMForConditionalGeneration,
    prompts: list[Prompt],
    alone: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = [replace(p, temperature=1.0, top_p=0.9) for p in prompts[:6]]
    mixed = [*drawn, *prompts[6:9]]
    found = [c.tokens for c in generate_batch(model, mixed, end_ids=[])]
    assert found[6:] == alone[6:9]
    assert found[:6] != alone[:6]
    assert found[:6] == [generate_batch(model, [p], end_ids=[])[0].tokens for p in drawn]
    other = [replace(p, seed=p.seed + 100) for p in drawn]
    assert found[:6] != [c.tokens for c in generate_batch(model, other, end_ids=[])]
    certain = [replace(p, top_p=0.0) for p in drawn]  # the nucleus of the likeliest alone
    assert [c.tokens for c in generate_batch(model, certain, end_ids=[])] == alone[:6]
    monkeypatch.setattr(model, "llm_support", replace(model.llm_support, cached=False))
    assert found[:2] == [c.tokens for c in generate_batch(model, drawn[:2], end_ids=[])]


def test_media_are_read_once_and_forgotten_when_memory_ends(
    model: OneLLMForConditionalGeneration,
) -> None:
    reads: list[int] = []

    def read(i: int) -> torch.Tensor:
        reads.append(i)
        return torch.full((3, 224, 224), float(i))

    def ask(*pictures: int) -> None:
        prompts = [
            Prompt([1, 5], [Medium("image", lambda i=i: read(i), str(i))], 1)  # type: ignore[misc]
            for i in pictures
        ]
        generate_batch(model, prompts, end_ids=[], media_cache=cache)

    one_picture = 30 * 48 * 4
    cache = MediaCache(max_bytes=2 * one_picture)
    ask(0, 1, 0, 1)
    ask(0)
    assert reads == [0, 1] and cache.reused == 3
    ask(2)  # picture 1 was used before picture 0
    ask(0, 1)
    assert reads == [0, 1, 2, 1]


def test_batches_are_alike_and_fit(prompts: list[Prompt]) -> None:
    batches = list(split_batches(prompts, 5, 300))
    assert sorted(place for places in batches for place in places) == list(range(len(prompts)))
    sizes = [[prompts[place].positions + NEW for place in places] for places in batches]
    assert all(len(size) <= 5 and max(size) * len(size) <= 300 for size in sizes)
    in_order = [n for size in sizes for n in size]
    assert sorted(in_order, reverse=True) == in_order
    assert [len(b) for b in split_batches(prompts[:3], 5, 1)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt([]), "prompt 0 has 0 tokens"),
        (Prompt([1], max_new_tokens=0), "asks for 0 new ones"),
        (Prompt([1], [Medium("fmri", torch.zeros(1, 15724))]), "prompt 0 has fmri"),
        (Prompt([1] * 500, max_new_tokens=13), "take 513 positions"),
        (Prompt([1, WORDS]), f"token {WORDS}"),
    ],
)
def test_wrong_prompts_are_refused(
    model: OneLLMForConditionalGeneration, prompt: Prompt, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generate_batch(model, [prompt], end_ids=[])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "opt", "phi3", "gpt_neo"])
def test_families_are_batched_where_that_is_exact(family: str) -> None:
    """Windows, soft caps, sinks, learned positions, RoPE by length; gpt_neo is not `cached`."""
    text = tiny_config(family)
    config = OneLLMConfig(
        vision=OneLLMVisionConfig(width=32, layers=1, heads=2, output_dim=16),
        upm=OneLLMUPMConfig(experts=1, blocks=1, heads=2, ffn=32, router_hidden=16),
        text_config=text,
        modalities=["imu"],
    )
    model = OneLLMForConditionalGeneration(config)
    initialise(model, 0, skip=("llm.",))
    with own_context():
        model.llm.load_state_dict(build_llm(text, "eager", GAINS[0]).state_dict())
    model.train(mode=False)
    assert model.llm_support.cached == (family != "gpt_neo")
    limit = 5 if family == "phi3" else 30  # RoPE by length: below the limit
    prompts = []
    for i in range(6):
        ids = [1, *torch.arange(3, 3 + (7 * i) % limit).tolist()]
        media = [Medium("imu", torch.randn(6, 400))] if i % 2 and limit > 5 else []
        prompts.append(Prompt(ids, media, max_new_tokens=3))
    found = [c.tokens for c in generate_batch(model, prompts, end_ids=[])]
    assert found == tokens_alone(model, prompts)


@pytest.mark.soak
def test_batches_are_three_times_as_fast_as_one_by_one() -> None:
    """Prompts of different length, five to a medium; measured in CPU seconds."""
    model = small_model(modalities=["imu"])
    model.train(mode=False)
    generator = torch.Generator().manual_seed(0)
    media = [Medium("imu", torch.randn(6, 400, generator=generator), str(i)) for i in range(13)]
    prompts = [
        Prompt(
            [1, *torch.randint(3, WORDS, (i * 37 % 200,), generator=generator).tolist()],
            [media[i // 5]],
            max_new_tokens=32,
        )
        for i in range(64)
    ]
    started = time.process_time()
    expected = tokens_alone(model, prompts)
    alone = time.process_time() - started
    statistics = BatchStatistics()
    started = time.process_time()
    found = generate_batch(model, prompts, end_ids=[], statistics=statistics)
    batched = time.process_time() - started
    assert [c.tokens for c in found] == expected
    print(f"{alone / batched:.1f} times as fast, {statistics.padding_share:.0%} padding")
    assert alone / batched >= 3, (alone, batched)
    assert 0 < statistics.padding_share < 0.3
