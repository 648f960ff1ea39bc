"""Before step 0: every sample fits, and there is something to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_worlds import open_plan, write

from onellm_dist.common.errors import UsageError
from onellm_dist.data.length_check import check_batch, check_corpus
from onellm_dist.data.token_counts import TokenCounts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lengths")
    write(root, "imu", ["imu"], 9)
    write(root, "talk", [], 9)
    write(root, "both", ["image", "imu"], 9)
    return root


def longest_text(root: Path, name: str) -> int:
    corpus = open_plan(root, {name: 1}).corpus
    counts = [corpus.token_counts.get_texts(0, s)[1] for s in range(len(corpus.shards[0]))]
    return max(int(count[:, 0].max()) for count in counts)


@pytest.mark.parametrize(("name", "spans"), [("talk", 0), ("imu", 1), ("both", 2)])
def test_the_longest_sample_decides_wherever_it_is(root: Path, name: str, spans: int) -> None:
    size = longest_text(root, name) + 32 * spans
    mixture = {"talk": 1.0, name: 1.0}
    check_corpus(open_plan(root, mixture, pack_llm_tokens=max(size, 32)).corpus)
    check_corpus(open_plan(root, mixture).corpus, positions=max(size, 32))
    with pytest.raises(UsageError, match=rf"sample {name}/.* {size} tokens; data.pack_llm_tokens"):
        check_corpus(open_plan(root, {name: 1.0}, pack_llm_tokens=size - 1).corpus)
    with pytest.raises(UsageError, match=rf"{size} tokens; the LLM's context .* of 9 samples"):
        check_corpus(open_plan(root, {name: 1.0}).corpus, positions=size - 1)


def test_the_samples_that_are_too_long_are_counted(root: Path) -> None:
    corpus = open_plan(root, {"both": 1.0}).corpus
    lengths = np.concatenate(
        [corpus.token_counts.get_texts(0, s)[1][:, 0] for s in range(len(corpus.shards[0]))]
    )
    shortest, longest = int(lengths.min()), int(lengths.max())
    wanted = int((lengths > shortest).sum())
    assert 1 < wanted < 9
    says = (
        rf"sample both/\S+ \(image, imu, {longest} text tokens\) needs {longest + 64} tokens; "
        rf"the LLM's context \(positions\) is {shortest + 64} \({wanted} of 9 samples of the "
        rf"dataset are too long\)\n(.*\n)*.*lower data.max_text_tokens to {shortest} "
    )
    with pytest.raises(UsageError, match=says):
        check_corpus(corpus, positions=shortest + 64)
    with pytest.raises(UsageError, match=r"9 of 9 .*\n(.*\n)*.*their spans alone take 64"):
        check_corpus(corpus, positions=60)


def test_a_batch_is_checked_sample_by_sample(root: Path) -> None:
    plan = open_plan(root, {"imu": 1, "talk": 1, "both": 1})
    samples = plan.step(0, 2).samples
    spans = [32 * len(plan.corpus.spans[number]) for number in samples.dataset.tolist()]
    lengths = samples.text_tokens + spans
    size = int(lengths.max())
    check_batch(plan.corpus, samples, positions=size)
    check_batch(plan.corpus, samples, positions=None)
    count = int((lengths == size).sum())
    says = rf"sample both/.* needs {size} tokens; .* is {size - 1} \({count} of 12 samples"
    with pytest.raises(UsageError, match=says):
        check_batch(plan.corpus, samples, positions=size - 1)


def test_an_encoder_budget_below_one_sample_is_refused(root: Path) -> None:
    corpus = open_plan(root, {"both": 1, "talk": 1}).corpus
    size = sum(corpus.modalities[name].encoder_tokens for name in ("image", "imu"))
    check_corpus(open_plan(root, {"both": 1}, pack_encoder_tokens=size).corpus)
    with pytest.raises(UsageError, match=rf"every sample of dataset both .* needs {size} enc"):
        check_corpus(open_plan(root, {"both": 1, "talk": 1}, pack_encoder_tokens=size - 1).corpus)


def test_budgets_that_no_text_can_exceed_cost_one_shard_of_reading(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_plan(root, {"imu": 1}, max_text_tokens=50).corpus
    read: list[int] = []
    get = TokenCounts.get_texts

    def count(self: TokenCounts, dataset: int, shard: int) -> Any:
        read.append(shard)
        return get(self, dataset, shard)

    monkeypatch.setattr(TokenCounts, "get_texts", count)
    monkeypatch.setattr("onellm_dist.data.length_check.CENSUS_SHARDS", 1)
    check_corpus(corpus, positions=82)
    assert read == [0]


@pytest.mark.parametrize("unsupervised", [["imu"], ["talk", "imu"], ["both"]])
def test_a_dataset_without_a_supervised_token_is_refused_also_beside_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, unsupervised: list[str]
) -> None:
    names = ["talk", "imu", "both"]
    corpus = open_plan(root, dict.fromkeys(names, 1.0)).corpus
    get = TokenCounts.get_texts

    def cut_off(self: TokenCounts, dataset: int, shard: int) -> Any:
        rows, counts = get(self, dataset, shard)
        counts = counts.copy()
        if names[dataset] in unsupervised:
            counts[:, 1] = 0
        return rows, counts

    monkeypatch.setattr(TokenCounts, "get_texts", cut_off)
    with pytest.raises(UsageError) as caught:
        check_corpus(corpus)
    for name in names:
        says = f"dataset {name}: none of its 9 samples has a supervised token"
        assert (says in str(caught.value)) is (name in unsupervised)


def test_some_samples_without_a_supervised_token_are_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = open_plan(root, {"imu": 1}).corpus
    get = TokenCounts.get_texts

    def cut_off(self: TokenCounts, dataset: int, shard: int) -> Any:
        rows, counts = get(self, dataset, shard)
        counts = counts.copy()
        counts[:2, 1] = 0
        counts[0] = (1, 0)
        return rows, counts

    monkeypatch.setattr(TokenCounts, "get_texts", cut_off)
    check_corpus(corpus)
    shards = len(corpus.shards[0])
    assert f"dataset imu: {2 * shards} of 9 samples teach nothing" in caplog.text
    assert f"{shards} have no text" in caplog.text and "lose their answer" in caplog.text
