"""Preference pairs from shard to pack: both answers of a sample stay together."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_worlds import open_plan, tokenizer
from pair_worlds import make_meta, write_pairs

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.turns import TurnsError, parse_pair
from onellm_dist.data.length_check import check_batch, check_corpus
from onellm_dist.data.media_text import MediaTextEncoder
from onellm_dist.data.packing import TokenBudget
from onellm_dist.data.pair_text import encode_pair
from onellm_dist.data.reader import Reader
from onellm_dist.data.text import TextEncoder, TextFormat
from onellm_dist.data.token_budget import UNLIMITED, find_smallest_budget, set_budget
from onellm_dist.data.token_counts import TokenCounts
from onellm_dist.modalities import SPAN_TOKENS, Part
from onellm_dist.packed import IGNORE

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEYS: dict[str, Any] = {
    "modalities": ("image",),
    "text_format": "conversation",
    "preference_pairs": True,
    "max_text_tokens": 200,
    "pack_llm_tokens": 900,
}


def make_parts(meta: dict[str, Any]) -> dict[str, Part]:
    return {"json": Part("json", json.dumps(meta).encode())}


def make_answer(meta: dict[str, Any], key: str) -> str:
    return str(meta[key][0]["value"])


def encode_answer(
    encoder: TextEncoder, meta: dict[str, Any], key: str
) -> tuple[list[int], list[int]]:
    """One of the answers as an ordinary conversation, whose earlier answers do not count."""
    prompt = [{**turn, "weight": 0} for turn in meta["conversations"] if turn["from"] == "gpt"]
    turns = [prompt.pop(0) if t["from"] == "gpt" else t for t in meta["conversations"]]
    parts = make_parts({"conversations": [*turns, *meta[key]]})
    return encoder.encode(parts)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root, splits={"train": 20}, broken=[3])
    return open_plan(root, {"pairs": 1}, **KEYS)


@pytest.mark.parametrize("format_", ["conversation", "chat"])
def test_a_pair_is_both_conversations_end_to_end(format_: TextFormat) -> None:
    tok = copy.deepcopy(tokenizer())
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tok.chat_template = CHATML
    encoder, single = (TextEncoder(tok, format_, 400, pairs=pairs) for pairs in (True, False))
    for number in range(6):
        meta = make_meta(number)
        pair = encode_pair(encoder, make_parts(meta), None)
        (ids, labels), (other, others) = (
            encode_answer(single, meta, k) for k in ("chosen", "rejected")
        )
        assert (pair.ids, pair.labels) == (ids + other, labels + others)
        assert pair.chosen_tokens == len(ids)
        supervised = [x for x in labels if x != IGNORE]
        assert make_answer(meta, "chosen") in tok.decode(supervised)
        assert 0 < len(supervised) < len(ids) / 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_pair_is_split_and_no_world_changes_what_a_step_reads(plan: Any, ranks: int) -> None:
    one, many = plan.step(1, 1), plan.step(1, ranks)
    assert plan.samples(1) == tuple(one.samples.refs())
    assert one.loss_count == many.loss_count == one.totals.pairs == 12
    read = []
    reader = Reader(plan.corpus)
    for micro in (m for rank in many.ranks for m in rank):
        batch = reader.read(micro)
        assert len(batch.chosen_tokens) == len(batch.text_token_counts)
        assert sum(batch.text_token_counts) + 64 * len(batch.sample_ids) <= 900 or batch.is_empty
        texts = batch.input_ids.split(list(batch.text_token_counts))
        read += list(zip(batch.sample_ids, [t.tolist() for t in texts], strict=False))
    alone = reader.read(next(m for m in plan.step(1, 1).ranks[0]))
    assert len({name for name, _ in read}) == 12
    found = dict(read)
    first = alone.input_ids.split(list(alone.text_token_counts))[0].tolist()
    assert found[alone.sample_ids[0]] == first


def test_media_are_read_once_and_a_broken_pair_keeps_its_place(plan: Any) -> None:
    reader, seen = Reader(plan.corpus), 0
    for micro in (m for step in (0, 1) for m in plan.step(step, 1).ranks[0]):
        batch = reader.read(micro)
        assert len(batch.values["image"]) == len(batch.sample_ids)
        for i, name in enumerate(batch.sample_ids):
            if "pair-0003" in name:
                seen += 1
                assert batch.weights[i] == 0 and i in batch.skipped_samples
                assert batch.chosen_tokens[i] == batch.text_token_counts[i] // 2
        starts = np.cumsum([0, *batch.text_token_counts])
        bos = plan.corpus.text_encoder.bos
        for i, chosen in enumerate(batch.chosen_tokens):
            assert batch.input_ids[starts[i]] == batch.input_ids[starts[i] + chosen] == bos
    assert seen


def test_ordinary_training_refuses_pairs_and_dpo_refuses_anything_else(tmp_path: Path) -> None:
    write_pairs(tmp_path, splits={"train": 4})
    with pytest.raises(UsageError, match="preference sample") as refused:
        open_plan(tmp_path, {"pairs": 1}, **{**KEYS, "preference_pairs": False})
    assert "train.loss=dpo" in str(refused.value)
    encoder = TextEncoder(tokenizer(), "conversation", 200, pairs=True)
    plain = {"conversations": make_meta(0)["conversations"][:2]}  # type: ignore[index]
    with pytest.raises(SampleError, match="does not end with a question that `chosen`"):
        encode_pair(encoder, make_parts(plain), None)


def test_the_smallest_budget_holds_both_texts_of_every_pair(tmp_path: Path) -> None:
    write_pairs(tmp_path, splits={"train": 8})
    keys = {**KEYS, "max_text_tokens": 110, "pack_llm_tokens": 1 << 20}
    plan = open_plan(tmp_path, {"pairs": 1}, **keys)
    smallest = find_smallest_budget(plan.corpus)
    assert smallest.llm == 2 * (110 + SPAN_TOKENS)
    plan.corpus.config = set_budget(plan.corpus.config, smallest)
    check_corpus(plan.corpus)
    own = open_plan(tmp_path, {"pairs": 1}, **{**keys, "pack_llm_tokens": smallest.llm})
    micros = [m for step in range(2) for m in own.step(step, 1).ranks[0]]
    assert sum(len(m.samples) for m in micros) == 24


def test_answers_that_are_cut_away_or_alike_are_refused() -> None:
    meta = make_meta(0)
    with pytest.raises(SampleError, match="nothing is left of its chosen answer"):
        encode_pair(
            TextEncoder(tokenizer(), "conversation", 20, pairs=True), make_parts(meta), None
        )
    alike = {**meta, "rejected": meta["chosen"]}
    with pytest.raises(SampleError, match="are the same"):
        encode_pair(
            TextEncoder(tokenizer(), "conversation", 200, pairs=True), make_parts(alike), None
        )


def test_placeholders_of_the_prompt_stand_at_the_same_places() -> None:
    base = TextEncoder(tokenizer(), "conversation", 200, pairs=True)
    encoder = MediaTextEncoder(base, ["image"])
    meta: dict[str, Any] = make_meta(2)
    meta["conversations"][2]["value"] = "what is it <image> is it a cube"
    pair = encode_pair(encoder, make_parts(meta), ["image"])
    assert len(pair.media) == 1 and pair.media[0].place > 1
    assert pair.ids[: pair.media[0].place] == pair.ids[pair.chosen_tokens :][: pair.media[0].place]
    moved = json.loads(json.dumps(make_meta(2)))
    moved["chosen"][0]["value"] = "a <image> cube"
    moved["rejected"][0]["value"] = "a small red cube <image>"
    with pytest.raises(SampleError, match="same places"):
        encode_pair(encoder, make_parts(moved), ["image"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": "a cube"}, "neither a turn nor a list"),
        ({"rejected": [{"from": "human", "value": "why"}]}, "an answer follows a question"),
        ({"conversations": [{"from": "gpt", "value": "hello"}]}, "an answer follows a question"),
        ({"chosen": [{"from": "tool", "value": "x"}]}, "tool"),
    ],
)
def test_malformed_pairs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TurnsError, match=message):
        parse_pair({**make_meta(0), **change}, ["image"])


def test_a_pair_that_fits_in_no_micro_batch_is_refused_before_the_first_step(plan: Any) -> None:
    small = plan.corpus.config.model_copy(update={"pack_llm_tokens": 150})
    corpus, before = plan.corpus, plan.corpus.config
    corpus.config = small
    try:
        with pytest.raises(UsageError, match="both of its texts stand in one micro-batch"):
            check_corpus(corpus)
    finally:
        corpus.config = before
    check_corpus(corpus, positions=400)
    with pytest.raises(UsageError, match="either text of a pair"):
        check_corpus(corpus, positions=60)
    assert torch.is_tensor(Reader(corpus).read(plan.step(0, 1).ranks[0][0]).labels)


def test_the_largest_pair_of_all_shards_says_how_far_to_raise_a_budget(tmp_path: Path) -> None:
    write_pairs(tmp_path, splits={"train": 28}, noisy=True)
    corpus = open_plan(tmp_path, {"pairs": 1}, **KEYS).corpus
    before, needed = corpus.config, []
    for shard in range(len(corpus.shards[0])):
        counts = corpus.token_counts.get_texts(0, shard)[1]
        needed.append(int(counts[:, 0].max()) + 2 * SPAN_TOKENS)
    assert needed[0] < max(needed)
    small = min(needed) - 1
    corpus.config = set_budget(before, TokenBudget(small, 1))
    with pytest.raises(UsageError, match="2 problems") as refused:
        check_corpus(corpus)
    assert f"needs {max(needed)} tokens; data.pack_llm_tokens is {small}" in str(refused.value)
    assert str(refused.value).count("encoder_tokens is 1") == 1
    corpus.config = set_budget(before, TokenBudget(max(needed), 4096))
    check_corpus(corpus)
    corpus.config = set_budget(before, TokenBudget(max(needed) - 1, 4096))
    with pytest.raises(UsageError, match=rf"raise data\.pack_llm_tokens to {max(needed)} or"):
        check_corpus(corpus)
    corpus.config = before
    with pytest.raises(UsageError, match=r"may need .* tokens; (.|\n)* say how long both are"):
        check_corpus(corpus, positions=60)


def test_counts_of_pairs_are_opened_only_where_the_recipe_leaves_it_open(
    plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, before = plan.corpus, plan.corpus.config
    read: list[int] = []
    get = TokenCounts.get_texts

    def count(self: TokenCounts, dataset: int, shard: int) -> Any:
        read.append(shard)
        return get(self, dataset, shard)

    monkeypatch.setattr(TokenCounts, "get_texts", count)
    monkeypatch.setattr("onellm_dist.data.length_check.CENSUS_SHARDS", 1)
    shards = list(range(len(corpus.shards[0])))
    assert len(shards) > 1
    try:
        for budget, positions, opened in (
            (UNLIMITED, None, []),
            (TokenBudget(464, 4096), 232, []),
            (TokenBudget(463, 4096), 232, shards),
            (TokenBudget(464, 4096), 231, shards),
        ):
            corpus.config = set_budget(before, budget)
            read.clear()
            check_corpus(corpus, positions=positions)
            assert read == [*opened, 0], (budget, positions)
        corpus.config = before
        with pytest.raises(UsageError, match=r"lower data\.max_text_tokens to 38 "):
            check_corpus(corpus, positions=70)
        refs = plan.step(0, 1).samples
        bound = int(min(refs.text_tokens.max() - 1, 200))
        with pytest.raises(UsageError, match=rf"may need {bound + 32} tokens"):
            check_batch(corpus, refs, positions=70)
    finally:
        corpus.config = before
