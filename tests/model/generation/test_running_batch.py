"""Prompts that join those that are being answered change nothing but the time they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from packs import WORDS, small_model

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.model.generation import running_batch
from onellm_dist.model.generation.batched import generate_batch
from onellm_dist.model.generation.media_cache import MediaCache, Medium
from onellm_dist.model.generation.rows import AnswerRow, Prompt
from onellm_dist.model.generation.running_batch import BatchStatistics, RunningBatch
from onellm_dist.model.llm import cached as llm_cached


@pytest.fixture(scope="module")
def model() -> Any:
    """Large weights, so that what a text says next depends on all that came before."""
    model = small_model(modalities=["image", "imu"])
    model.train(mode=False)
    with torch.no_grad():
        for name, p in model.llm.named_parameters():
            if "proj" in name:
                p.mul_(2.5)
    return model


def make_prompts() -> list[Prompt]:
    """Texts of 2 to 31 tokens, some with media, some sampled, of 1 to 12 new tokens."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(3, 224, 224, generator=generator)
    motions = torch.randn(2, 6, 400, generator=generator)
    prompts = []
    for i in range(10):
        ids = [1, *torch.randint(3, WORDS, (1 + i * 13 % 30,), generator=generator).tolist()]
        media = [
            *([Medium("image", picture, "picture")] if i % 3 == 1 else []),
            *([Medium("imu", motions[i % 2], f"motion {i % 2}")] if i % 4 == 2 else []),
        ]
        heat = 0.8 if i % 2 else 0.0
        prompts.append(Prompt(ids, media, 1 + i * 5 % 12, temperature=heat, top_p=0.95, seed=i))
    return prompts


def finish(batch: RunningBatch) -> None:
    while batch.rows:
        batch.step()


def test_rows_that_join_and_those_they_join_get_their_own_tokens(model: Any) -> None:
    prompts = make_prompts()
    alone = [generate_batch(model, [prompt], end_ids=[])[0].tokens for prompt in prompts]
    assert len(set(alone)) == len(alone)
    statistics = BatchStatistics()
    batch = RunningBatch(model, MediaCache(), statistics)
    rows = [AnswerRow(i, prompt, [], None, None) for i, prompt in enumerate(prompts)]
    left, most = list(rows), 0
    for count in (2, 0, 1, 3, 0, 0, 1, 2, 1):
        batch.join(left[:count]) if count else None
        left = left[count:]
        most = max(most, len(batch.rows))
        batch.step()
    while batch.rows:
        batch.step()
    assert not left and [tuple(row.tokens) for row in rows] == alone
    assert most >= 4 and statistics.padding > 0
    batch.step()  # of no rows
    assert {row.ended for row in rows} == {"length"}


def test_a_prompt_that_cannot_join_disturbs_nobody(model: Any) -> None:
    first, second = make_prompts()[3], make_prompts()[7]
    alone = [generate_batch(model, [prompt], end_ids=[])[0].tokens for prompt in (first, second)]
    batch = RunningBatch(model, None, BatchStatistics())
    rows = [AnswerRow(0, prompt, [], None, None) for prompt in (first, second)]
    batch.join(rows[:1])
    with pytest.raises(UsageError, match=f"token {WORDS}"):
        batch.join([rows[1], AnswerRow(0, Prompt([1, WORDS]), [], None, None)])
    assert batch.rows == rows[:1]
    batch.join(rows[1:])
    while batch.rows:
        batch.step()
    assert [tuple(row.tokens) for row in rows] == alone
    batch.join([AnswerRow(0, first, [], None, None)])
    batch.clear()
    assert batch.rows == []


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_row_without_a_token_ends_alone_where_its_error_is_taken(
    model: Any, monkeypatch: pytest.MonkeyPatch, is_taken: bool
) -> None:
    prompts = [make_prompts()[i] for i in (1, 7, 9)]
    alone = [generate_batch(model, [prompt], end_ids=[])[0].tokens for prompt in prompts]
    original, steps, errors = llm_cached.decode, [], []

    def damage(*args: Any) -> torch.Tensor:
        logits = original(*args)
        steps.append(len(logits))
        if len(steps) == 3:
            logits[1] = torch.nan
        return logits

    def take(place: int, error: Exception) -> None:
        errors.append((place, str(error)))

    monkeypatch.setattr(running_batch, "decode", damage)
    batch = RunningBatch(model, None, BatchStatistics())
    on_error = take if is_taken else None
    rows = [AnswerRow(i, p, [], None, None, None, on_error) for i, p in enumerate(prompts)]
    batch.join(rows)
    if not is_taken:
        with pytest.raises(OneLLMError, match="logits that are not numbers"):
            finish(batch)
        return
    finish(batch)
    ((place, said),) = errors
    assert place == 1 and "logits that are not numbers" in said
    assert [tuple(row.tokens) for row in rows] == [alone[0], alone[1][:3], alone[2]]
    assert [row.ended for row in rows] == ["length", None, "length"]


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_raised_for_one_row_ends_that_row(
    model: Any, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    prompts = [make_prompts()[i] for i in (1, 7)]
    alone = [generate_batch(model, [prompt], end_ids=[])[0].tokens for prompt in prompts]
    monkeypatch.setattr(model, "llm_support", replace(model.llm_support, cached=cached))
    errors: list[int] = []

    def fail(place: int, _: int) -> None:
        if place == 0 and len(rows[0].tokens) == 2:
            raise ValueError("this text")

    batch = RunningBatch(model, None, BatchStatistics())
    rows = [
        AnswerRow(i, prompt, [], None, fail, None, lambda place, _: errors.append(place))
        for i, prompt in enumerate(prompts)
    ]
    batch.join(rows)
    finish(batch)
    assert errors == [0]
    assert [tuple(row.tokens) for row in rows] == [alone[0][:2], alone[1]]


def test_rows_that_have_joined_have_room_for_their_next_tokens(model: Any) -> None:
    prompts = [make_prompts()[i] for i in (7, 9)]
    batch = RunningBatch(model, None, BatchStatistics())
    for prompt in prompts:
        batch.join([AnswerRow(0, prompt, [], None, None)])
    assert batch._cached is not None
    layers: list[Any] = list(batch._cached.cache.layers)

    def find_memory() -> list[int]:
        return [x.untyped_storage().data_ptr() for one in layers for x in (one.keys, one.values)]

    before = find_memory()
    batch.step()
    assert len(batch.rows) == 2 and find_memory() == before


def test_room_is_counted_with_what_is_being_answered(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = RunningBatch(model, None, BatchStatistics(), max_positions=100)
    short, long = Prompt([1] * 10, max_new_tokens=10), Prompt([1] * 40, max_new_tokens=20)
    assert batch.has_room([short] * 5) and not batch.has_room([short] * 6)
    assert batch.has_room([replace(long, max_new_tokens=400)])  # alone, each has
    batch.join([AnswerRow(0, short, [], None, None)])
    assert batch.has_room([short] * 4) and not batch.has_room([short] * 5)
    assert not batch.has_room([long])
    monkeypatch.setattr(model, "llm_support", replace(model.llm_support, cached=False))
    assert not batch.has_room([short])
    batch.clear()
    assert batch.has_room([short]) and not batch.has_room([short] * 2)
