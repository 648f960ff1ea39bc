"""Samples that differ in media and spans: plan, costs, budgets and packs."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_worlds import open_plan, section, write
from media_worlds import MODALITIES, make_sample, wav, write_media, write_wide

from onellm_dist.common.errors import UsageError
from onellm_dist.data.length_check import check_corpus
from onellm_dist.data.media import CorpusMedia
from onellm_dist.data.micro_batch import SampleTable
from onellm_dist.data.packing import TokenBudget
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.data.token_budget import UNLIMITED, find_smallest_budget
from onellm_dist.modalities import SPAN_TOKENS, get_modality
from onellm_dist.shards.format.dataset import open_dataset
from onellm_dist.shards.format.media import LISTED
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.shards.tools.index_existing import index_existing_shards

MIXTURE = {"many": 3.0, "pic": 1.0, "talk": 1.0}
BUDGETS = {"pack_llm_tokens": 640, "pack_encoder_tokens": 8192}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    write_media(root, "many", 40)
    write(root, "pic", ["image"], 13)
    write(root, "talk", [], 11)
    return root


def _open(root: Path, **keys: Any) -> Plan:
    fixed: dict[str, Any] = {"text_format": "conversation", "max_text_tokens": 90, **BUDGETS}
    return open_plan(root, MIXTURE, **{**fixed, **keys})


def test_costs_and_budgets_count_every_span(root: Path) -> None:
    plan = _open(root, global_batch=24)
    reader = Reader(plan.corpus)
    seen: Counter[int] = Counter()
    for step in range(3):
        assigned = plan.step(step, 2)
        totals = assigned.totals
        llm = encoder = 0
        combinations: Counter[frozenset[str]] = Counter()
        for rank in assigned.ranks:
            for micro in rank:
                batch = reader.read(micro)
                assert not batch.skipped_samples
                spans = [len(own) for own in batch.modalities]
                own_llm = sum(batch.text_token_counts) + SPAN_TOKENS * sum(spans)
                own_encoder = sum(
                    len(value) * get_modality(name).encoder_tokens
                    for name, value in batch.values.items()
                )
                assert own_llm <= BUDGETS["pack_llm_tokens"]
                assert own_encoder <= BUDGETS["pack_encoder_tokens"]
                if not batch.is_empty:
                    llm, encoder = llm + own_llm, encoder + own_encoder
                    combinations.update(map(frozenset, batch.modalities))
                    seen.update(spans)
        assert (totals.llm_tokens, totals.encoder_tokens) == (llm, encoder)
        assert {frozenset(k): v for k, v in totals.samples_by_combination.items() if v} == dict(
            combinations
        )
    assert len(seen) >= 6


def test_one_stream_for_any_number_of_ranks_and_any_history(root: Path) -> None:
    whole, draw = _open(root, global_batch=16), random.Random(0)
    step = 0
    while step < 10:
        plan = _open(root, global_batch=16)
        world_size = draw.choice((1, 2, 3, 4, 8))
        for _ in range(draw.randint(1, 4)):
            assigned = plan.step(step, world_size)
            assert Counter(s for r in assigned.ranks for m in r for s in m.samples) == Counter(
                whole.samples(step)
            )
            assert plan.digest(step) == whole.digest(step)
            assert assigned.digest() == whole.step(step, world_size).digest()
            step += 1


def test_a_sample_has_the_same_values_in_every_pack(root: Path) -> None:
    """A sample's spans, places and values depend on it alone, not on its neighbours."""
    alone: dict[str, tuple[Any, ...]] = {}
    for world_size in (1, 3):
        plan = _open(root, global_batch=12)
        reader = Reader(plan.corpus)
        for rank in plan.step(0, world_size).ranks:
            for micro in rank:
                batch = reader.read(micro)
                used = dict.fromkeys(batch.values, 0)
                for i, name in enumerate(batch.sample_ids):
                    rows = []
                    for span in batch.modalities[i]:
                        rows.append(batch.values[span][used[span]].sum().item())
                        used[span] += 1
                    places = batch.places[i] if batch.places else (1,) * len(rows)
                    found = (batch.modalities[i], places, rows)
                    assert alone.setdefault(name, found) == found
    assert any(set(places) != {1} for _, places, _ in alone.values() if places)


def test_balance_of_many_ranks(root: Path) -> None:
    plan = _open(root, global_batch=5120)
    assert plan.step(0, 16).balance <= 1.05


def test_media_that_do_not_fit_their_text_are_skipped_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with DatasetWriter(
        tmp_path / "bad", name="bad", modalities=MODALITIES, attributes=LISTED
    ) as writer:
        writer.add("train", "a", make_sample(["image"], "<image> <image> what", rng))
        writer.add("train", "b", make_sample(["image", "imu"], "<imu> what <image>", rng))
    plan = open_plan(tmp_path, {"bad": 1.0}, text_format="conversation", global_batch=2)
    reader = Reader(plan.corpus)
    (micro,) = plan.step(0, 1).ranks[0]
    batch = reader.read(micro)
    assert len(batch.skipped_samples) == 1
    assert batch.weights.tolist().count(0.0) == 1
    good = next(i for i in range(2) if i not in batch.skipped_samples)
    assert batch.modalities[good] == ("imu", "image")
    assert len(batch.values["image"]) == 2  # the skipped one keeps its place, of zeros


def test_a_medium_takes_several_spans(tmp_path: Path) -> None:
    sizes = [(200, 200), (448, 224), (900, 300), (500, 500), (60, 60)]
    write_wide(tmp_path, "wide", sizes)
    with pytest.raises(UsageError, match="onellm shards index --media"):
        open_plan(tmp_path, {"wide": 1.0}, spans={"image": 5}).step(0, 1)
    before = open_plan(tmp_path, {"wide": 1.0}, global_batch=5)
    old = before.step(0, 1).digest(), before.digest(0)
    one = Reader(before.corpus).read(before.step(0, 1).ranks[0][0])
    index_existing_shards(tmp_path / "wide", media=True)
    keys: dict[str, Any] = {"global_batch": 5, "pack_llm_tokens": 1024, "pack_encoder_tokens": 8192}
    same = open_plan(tmp_path, {"wide": 1.0}, global_batch=5)
    assert (same.step(0, 1).digest(), same.digest(0)) == old
    again = Reader(same.corpus).read(same.step(0, 1).ranks[0][0])
    assert torch.equal(again.values["image"], one.values["image"])
    plan = open_plan(tmp_path, {"wide": 1.0}, spans={"image": 5}, augment=False, **keys)
    assert plan.digest(0) == old[1]
    check_corpus(plan.corpus)
    (micro,) = plan.step(0, 1).ranks[0]
    batch = Reader(plan.corpus).read(micro)
    spans = {r.row: len(s) for r, s in zip(micro.samples, batch.modalities, strict=True)}
    assert spans == {0: 1, 1: 3, 2: 4, 3: 5, 4: 1}
    assert plan.step(0, 1).totals.encoder_tokens == 14 * 257
    assert batch.places == ()
    assert [list(own) for own in batch.span_numbers] == [
        list(range(len(s))) for s in batch.modalities
    ]
    assert one.span_numbers == ()


def test_sounds_take_windows_and_share_them(tmp_path: Path) -> None:
    with DatasetWriter(
        tmp_path / "songs", name="songs", modalities=("audio",), attributes=LISTED
    ) as writer:
        for number, seconds in enumerate([3.0, 12.0, 25.0, 80.0]):
            sample = {"0.wav": wav(seconds), "txt": b"<audio> a red cube"}
            writer.add("train", f"{number}", sample)
        two = {"0.wav": wav(30), "1.wav": wav(30), "txt": b"<audio> a red <audio> cube"}
        writer.add("train", "4", two)
    keys: dict[str, Any] = {
        "global_batch": 5,
        "pack_llm_tokens": 4096,
        "pack_encoder_tokens": 65536,
    }
    plan = open_plan(
        tmp_path, {"songs": 1.0}, modalities=["audio"], spans={"audio": 4}, augment=False, **keys
    )
    (micro,) = plan.step(0, 1).ranks[0]
    batch = Reader(plan.corpus).read(micro)
    spans = {r.row: len(s) for r, s in zip(micro.samples, batch.modalities, strict=True)}
    assert spans == {0: 1, 1: 2, 2: 3, 3: 4, 4: 4}
    at = next(i for i, r in enumerate(micro.samples) if r.row == 4)
    assert batch.span_numbers[at] == (0, 1, 0, 1)
    assert batch.places[at][:2] == (1, 1) and batch.places[at][2] == batch.places[at][3] > 1


def test_too_large_a_sample_is_named_before_step_0(root: Path) -> None:
    plan = _open(root, pack_llm_tokens=200, pack_encoder_tokens=600)
    with pytest.raises(UsageError, match=r"encoder tokens; data.pack_encoder_tokens is 600"):
        check_corpus(plan.corpus)
    with pytest.raises(UsageError, match=r"needs \d+ tokens; data.pack"):
        [plan.step(step, 1) for step in range(20)]


def test_the_smallest_budget_holds_every_sample_alone(root: Path) -> None:
    plan = _open(root)
    smallest = find_smallest_budget(plan.corpus)
    before = plan.step(0, 1)
    plan.set_budget(smallest)
    check_corpus(plan.corpus)
    after = plan.step(0, 1)
    fullest = plan.find_fullest(0, 1)
    assert len(after.assigned[0]) > len(before.assigned[0])
    assert fullest.llm <= smallest.llm and fullest.encoder <= smallest.encoder
    assert plan.digest(0) == _open(root).digest(0)
    plan.set_budget(TokenBudget(smallest.llm, smallest.encoder - 1))
    with pytest.raises(UsageError, match=f"{smallest.encoder} encoder tokens"):
        check_corpus(plan.corpus)


@pytest.mark.seconds
def test_the_largest_sample_counts_in_whichever_shard_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes of media are read of samples that may be larger than all before."""
    rng = np.random.default_rng(0)
    with DatasetWriter(
        tmp_path / "late", name="late", modalities=MODALITIES, attributes=LISTED, max_samples=1
    ) as writer:
        for number in range(102):
            names = ["image", "image", "fmri"] if number == 101 else ["imu"]
            writer.add("train", f"{number:03d}", make_sample(names, "what", rng))
    corpus = open_plan(tmp_path, {"late": 1.0}, text_format="conversation").corpus
    assert len(corpus.shards[0]) == 102
    measured, count = list[int](), CorpusMedia.count

    def keep(self: CorpusMedia, table: SampleTable, members: Any) -> Any:
        measured.append(len(members))
        return count(self, table, members)

    monkeypatch.setattr(CorpusMedia, "count", keep)
    tokens = sum(corpus.modalities[name].encoder_tokens for name in ("image", "image", "fmri"))
    llm = corpus.config.max_text_tokens + 3 * SPAN_TOKENS
    assert find_smallest_budget(corpus) == TokenBudget(llm, tokens)
    assert measured == [1, 1]


def test_budgets_without_a_limit_need_no_look_at_the_media(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = {"pack_llm_tokens": UNLIMITED.llm, "pack_encoder_tokens": UNLIMITED.encoder}
    plan = _open(root, **budgets)
    with pytest.raises(UsageError, match="the LLM's context"):
        check_corpus(plan.corpus, positions=40)
    monkeypatch.delattr(CorpusMedia, "count_at_most")
    check_corpus(plan.corpus)


def test_budgets_that_nobody_has_found_are_refused(root: Path) -> None:
    plan = _open(root, pack_llm_tokens="auto", pack_encoder_tokens="auto")
    with pytest.raises(UsageError, match="a start of training finds them"):
        plan.step(0, 1)


@pytest.mark.seconds
def test_too_large_a_sample_of_any_shard_is_named_before_step_0(tmp_path: Path) -> None:
    """The last of 120 shards has the only picture of four tiles; bounds alone refuse nothing."""
    sizes = [(200, 200)] * 119 + [(500, 500)]
    write_wide(tmp_path, "wide", sizes, max_samples=1)
    index_existing_shards(tmp_path / "wide", media=True)
    keys: dict[str, Any] = {"spans": {"image": 5}, "pack_encoder_tokens": 8192}
    tight = open_plan(tmp_path, {"wide": 1.0}, pack_llm_tokens=160, **keys)
    assert len(tight.corpus.shards[0]) == 120
    with pytest.raises(UsageError, match=r"0119.* needs \d+ tokens.*\(1 of 120 samples of"):
        check_corpus(tight.corpus)
    few = open_plan(tmp_path, {"wide": 1.0}, spans={"image": 5}, pack_encoder_tokens=1200)
    with pytest.raises(UsageError, match=r"0119@0 .* needs 1285 encoder tokens"):
        check_corpus(few.corpus)
    check_corpus(open_plan(tmp_path, {"wide": 1.0}, pack_llm_tokens=180, **keys).corpus)


def test_too_long_samples_of_several_captions_are_counted_once(tmp_path: Path) -> None:
    with DatasetWriter(
        tmp_path / "caps", name="caps", modalities=("image",), attributes=LISTED
    ) as writer:
        for number in range(3):
            meta = {"caption": ["a red cube", "a blue one", "green"], "media": []}
            writer.add("train", str(number), {"json": json.dumps(meta).encode()})
    plan = open_plan(tmp_path, {"caps": 1.0}, text_format="caption")
    with pytest.raises(UsageError, match=r"\(3 of 3 samples of the dataset are too long\)"):
        check_corpus(plan.corpus, positions=1)


def test_old_shards_have_the_same_bytes(tmp_path: Path) -> None:
    """A dataset that lists no media has no new column, and its index says nothing of media."""
    dataset = write(tmp_path, "pic", ["image"], 3)
    index = dataset.index(dataset.shards()[0])
    assert index.media is None
    assert b"media" not in index.path.read_bytes()
    assert not open_dataset(tmp_path / "pic").lists_media
    assert section(tmp_path, {"pic": 1.0}).spans == {}
