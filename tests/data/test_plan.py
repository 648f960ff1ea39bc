"""The plan: a pure function of seed, mixture, shards and step, for any number of ranks."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_worlds import open_plan, section, tokenizer, write

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import DataSection
from onellm_dist.data.corpus import open_datasets
from onellm_dist.data.micro_batch import SampleRef
from onellm_dist.data.plan import Plan
from onellm_dist.data.token_counts import get_token_count_path
from onellm_dist.modalities import SPAN_TOKENS
from onellm_dist.shards.format.writer import DatasetWriter

MIXTURE = {"pic": 2.0, "imu": 1.0, "talk": 1.0, "both": 0.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    write(root, "pic", ["image"], 40)
    write(root, "imu", ["imu"], 25)
    write(root, "talk", [], 11)
    write(root, "both", ["image", "imu"], 16)
    return root


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(root: Path) -> None:
    plan = open_plan(root, MIXTURE)
    for step in range(4):
        expected = Counter(plan.samples(step))
        assert sum(expected.values()) == 12
        for world_size in (1, 2, 3, 4, 5, 8):
            assigned = open_plan(root, MIXTURE).step(step, world_size)
            assert len(assigned.ranks) == world_size
            assert (
                Counter(s for rank in assigned.ranks for micro in rank for s in micro.samples)
                == expected
            )
            assert assigned.global_valid_tokens == sum(
                s.supervised_tokens for s in expected.elements()
            )


@pytest.mark.seconds
def test_any_history_of_stops_and_ranks_gives_one_stream(root: Path) -> None:
    """Twenty starts on random numbers of ranks, each killed at a random step and resumed."""
    whole, draw = open_plan(root, MIXTURE, global_batch=16), random.Random(0)
    applied: dict[int, str] = {}
    step = 0
    for _ in range(20):
        world_size, plan = (
            draw.choice((1, 2, 3, 4, 5, 8)),
            open_plan(root, MIXTURE, global_batch=16),
        )
        killed = step + draw.randint(1, 15)
        for at in range(step, killed):
            names = [
                plan.corpus.sample_id(ref)
                for rank in plan.step(at, world_size).ranks
                for micro in rank
                for ref in micro.samples
            ]
            text = "".join(f"{name}\n" for name in sorted(names, key=str.encode))
            assert applied.setdefault(
                at, hashlib.sha256(text.encode()).hexdigest()
            ) == whole.digest(at)
        step = draw.randint(max(step, killed - 5), killed)
    assert len(applied) > 60


def test_steps_may_be_asked_in_any_order(root: Path) -> None:
    forward = [open_plan(root, MIXTURE).samples(step) for step in range(6)]
    plan = open_plan(root, MIXTURE)
    assert [plan.samples(step) for step in (5, 0, 3, 1, 4, 2)] == [
        forward[step] for step in (5, 0, 3, 1, 4, 2)
    ]


def test_every_sample_comes_once_per_epoch(root: Path) -> None:
    plan = open_plan(root, {"imu": 1}, global_batch=5)
    names = [plan.corpus.sample_id(ref) for step in range(10) for ref in plan.samples(step)]
    assert len(set(names)) == 50
    assert Counter(name.split("@")[1] for name in names) == {"0": 25, "1": 25}
    assert {name.split("@")[0] for name in names[:25]} == {
        f"imu/train-{n // 7:06d}/imu-{n:04d}" for n in range(25)
    }


def test_the_mixture_is_kept_at_every_step(root: Path) -> None:
    plan = open_plan(root, MIXTURE)
    counts: Counter[int] = Counter()
    for step in range(12):
        counts.update(ref.dataset for ref in plan.samples(step))
        for dataset, share in enumerate((4 / 9, 2 / 9, 2 / 9, 1 / 9)):
            assert abs(counts[dataset] - share * 12 * (step + 1)) < 1


def test_micro_batches_are_numbered_and_within_the_budgets(root: Path) -> None:
    plan = open_plan(root, MIXTURE, pack_llm_tokens=160, pack_encoder_tokens=900)
    ranks = plan.step(3, 2).ranks
    assert len({len(rank) for rank in ranks}) == 1
    for number, rank in enumerate(ranks):
        for index, micro in enumerate(rank):
            assert (micro.step, micro.rank, micro.index, micro.count) == (
                3,
                number,
                index,
                len(rank),
            )
            assert micro.last == (index == len(rank) - 1)
            assert (
                sum(
                    s.text_tokens + SPAN_TOKENS * len(plan.corpus.spans[s.dataset])
                    for s in micro.samples
                )
                <= 160
            )
            assert (
                sum(
                    plan.corpus.modalities[m].encoder_tokens
                    for s in micro.samples
                    for m in plan.corpus.spans[s.dataset]
                )
                <= 900
            )


def test_ranks_without_samples_get_empty_micro_batches(root: Path) -> None:
    ranks = open_plan(root, MIXTURE, global_batch=3).step(0, 8).ranks
    assert [len(rank) for rank in ranks] == [1] * 8
    assert sum(rank[0].is_empty for rank in ranks) == 5


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_totals_and_digest_of_a_step_are_those_of_its_micro_batches(
    root: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """They come from arrays: no SampleRef is built for them."""
    config: dict[str, Any] = {"pack_llm_tokens": 160, "pack_encoder_tokens": 900}
    expected, plan = (open_plan(root, MIXTURE, **config) for _ in range(2))
    micro_batches = [m for rank in expected.step(3, world_size).ranks for m in rank]
    refs = [ref for micro in micro_batches for ref in micro.samples]
    spans = expected.corpus.spans
    content = hashlib.sha256()
    for micro in micro_batches:
        rows = [tuple(ref) for ref in micro.samples]
        key = (micro.step, micro.rank, micro.index, micro.count, micro.global_valid_tokens, rows)
        content.update(repr(key).encode())

    expected_digest = expected.digest(3)

    monkeypatch.setattr(SampleRef, "_make", None)
    step = plan.step(3, world_size)
    totals = step.totals
    assert step.digest() == content.hexdigest()
    assert plan.digest(3) == expected_digest
    assert totals.samples == len(refs) == 12
    assert totals.llm_tokens == sum(
        ref.text_tokens + SPAN_TOKENS * len(spans[ref.dataset]) for ref in refs
    )
    assert totals.encoder_tokens == sum(
        plan.corpus.modalities[m].encoder_tokens for ref in refs for m in spans[ref.dataset]
    )
    assert totals.supervised_tokens == sum(ref.supervised_tokens for ref in refs)
    assert step.global_valid_tokens == totals.supervised_tokens
    assert totals.empty_micro_batches == sum(micro.is_empty for micro in micro_batches)
    assert totals.samples_by_dataset == tuple(
        sum(ref.dataset == number for ref in refs) for number in range(4)
    )
    assert totals.samples_by_combination == Counter(spans[ref.dataset] for ref in refs)


def test_the_digest_is_that_of_the_design_page(root: Path) -> None:
    plan = open_plan(root, MIXTURE)
    names = [plan.corpus.sample_id(ref) for ref in plan.samples(2)]
    text = "".join(f"{name}\n" for name in sorted(names, key=str.encode))
    assert plan.digest(2) == hashlib.sha256(text.encode()).hexdigest()
    assert len({plan.digest(step) for step in range(5)}) == 5


def test_repeats_within_a_step_count_in_the_digest(root: Path) -> None:
    plan = open_plan(root, {"talk": 1}, global_batch=30)
    names = plan.corpus.sample_ids(plan.samples(0))
    assert len(set(names)) == 30  # epochs differ
    assert {name.split("@")[1] for name in names} == {"0", "1", "2"}


def test_seed_and_mixture_change_the_stream_and_the_fingerprint(root: Path) -> None:
    plans = [
        open_plan(root, MIXTURE),
        open_plan(root, MIXTURE, seed=1),
        open_plan(root, MIXTURE | {"pic": 3.0}),
        open_plan(root, MIXTURE, global_batch=13),
    ]
    assert len({plan.digest(0) for plan in plans}) == 4
    assert len({plan.fingerprint() for plan in plans}) == 4
    again = open_plan(root, MIXTURE)
    assert (again.digest(0), again.fingerprint()) == (plans[0].digest(0), plans[0].fingerprint())


def test_another_dataset_does_not_reorder_the_others(root: Path) -> None:
    def stream(plan: Plan, name: str) -> list[str]:
        names = [plan.corpus.sample_id(ref) for step in range(30) for ref in plan.samples(step)]
        return [n for n in names if n.startswith(f"{name}/")][:20]

    assert stream(open_plan(root, MIXTURE), "pic") == stream(
        open_plan(root, {"imu": 3, "pic": 1}), "pic"
    )


def test_packing_keys_do_not_change_the_stream(root: Path) -> None:
    a, b = (
        open_plan(root, MIXTURE),
        open_plan(root, MIXTURE, pack_llm_tokens=200, workers=7, augment=False),
    )
    assert [a.digest(step) for step in range(3)] == [b.digest(step) for step in range(3)]
    assert a.step(0, 2).digest() != b.step(0, 2).digest()
    assert a.step(0, 2).digest() == open_plan(root, MIXTURE).step(0, 2).digest()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"pack_encoder_tokens": 300},
            r"sample (imu|both)/train-.* data.pack_encoder_tokens is 300",
        ),
        ({"pack_llm_tokens": 40}, r"data.pack_llm_tokens is 40"),
    ],
)
def test_a_sample_larger_than_a_micro_batch_is_named(
    root: Path, keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        open_plan(root, MIXTURE, **keys).step(0, 2)


def test_token_counts_come_from_the_text(root: Path) -> None:
    plan = open_plan(root, {"talk": 1}, global_batch=11)
    by_name = {plan.corpus.sample_id(ref).split("/")[-1]: ref for ref in plan.samples(0)}
    words = len(
        tokenizer()("a red cube left of a small blue sphere", add_special_tokens=False)["input_ids"]
    )
    assert isinstance(by_name["talk-0000@0"], SampleRef)
    assert (by_name["talk-0000@0"].text_tokens, by_name["talk-0000@0"].supervised_tokens) == (
        words + 2,
        words + 1,
    )


def test_all_problems_of_the_mixture_are_reported_at_once(root: Path) -> None:
    with pytest.raises(UsageError) as info:
        open_datasets(
            section(root, {"pic": 1, "nowhere": 1, "imu": float("inf")}), ["image", "imu"]
        )
    assert "2 problems" in str(info.value)
    assert "nowhere" in str(info.value)
    assert "weight inf" in str(info.value)


@pytest.mark.parametrize(
    ("mixture", "modalities", "says"),
    [
        ({"imu": 1, "pic": 1}, ["image"], r"imu has modality imu; the model has image"),
        ({"pic": 1, "../%s/pic": 1}, ["image"], r"have the same name, 'pic'"),
        ({"nowhere": 1}, ["image"], "nowhere"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(
    root: Path, mixture: dict[str, float], modalities: list[str], says: str
) -> None:
    mixture = {name.replace("%s", root.name): weight for name, weight in mixture.items()}
    with pytest.raises(UsageError, match=says):
        open_plan(root, mixture, modalities=modalities)


def test_a_dataset_without_a_training_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "test_only", [], 3, split="test")
    with pytest.raises(UsageError, match="no split 'train'"):
        open_plan(tmp_path, {"test_only": 1})
    config = section(tmp_path, {"test_only": 1})
    assert (
        len(Plan.open(config, tokenizer(), 0, ["image"], split="test", show=False).samples(0)) == 12
    )


def test_ranks_that_do_not_count_refuse_missing_token_counts(tmp_path: Path) -> None:
    dataset = write(tmp_path, "talk", [], 9)
    config = section(tmp_path, {"talk": 1})
    with pytest.raises(UsageError, match="2 shards without token counts"):
        Plan.open(config, tokenizer(), 0, ["image"], build_counts=False)
    first = Plan.open(config, tokenizer(), 0, ["image"], show=False)
    assert Plan.open(config, tokenizer(), 0, ["image"], build_counts=False).digest(
        0
    ) == first.digest(0)
    assert get_token_count_path(
        dataset, dataset.shards()[0], first.corpus.text_encoder.fingerprint
    ).exists()


def test_the_loss_of_a_step_without_readable_texts_is_divided_by_one(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "bad", name="bad", modalities=()) as writer:
        writer.add("train", "only", {"txt": b"\xff"})
    assert open_plan(tmp_path, {"bad": 1}, global_batch=2).step(0, 1).global_valid_tokens == 1


def test_a_dataset_of_links_is_read_if_the_recipe_says_so(root: Path, tmp_path: Path) -> None:
    name = "pic"
    shutil.copytree(root / name, tmp_path / name)
    shutil.rmtree(tmp_path / name / "shards")
    (tmp_path / name / "shards").symlink_to(root / name / "shards")
    keys: dict[str, Any] = {"root": tmp_path, "mixture": [{"path": name}], "global_batch": 1}
    modalities = ["image"]
    with pytest.raises(UsageError, match=r"leads out of the folder(.|\n)*data\.follow_links=true"):
        open_datasets(DataSection(**keys), modalities)
    (dataset,) = open_datasets(DataSection(**keys, follow_links=True), modalities)
    assert dataset.name == name
