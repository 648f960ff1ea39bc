"""MicroBatch to PackedBatch: reading, seeded augmentation, retries, skipped samples."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_worlds import encode, open_plan, tokenizer, write

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.data import retry
from onellm_dist.data.corpus import Corpus
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.data.token_counts import get_token_count_path
from onellm_dist.modalities import Modality
from onellm_dist.model.pixels import make_input
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.shards.format import parts as parts_module
from onellm_dist.shards.format.dataset import Dataset, ShardInfo, open_dataset
from onellm_dist.shards.format.index import ShardIndex
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.format.writer import DatasetWriter

MIXTURE = {"pic": 2.0, "imu": 1.0, "talk": 1.0, "both": 0.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reader")
    write(root, "pic", ["image"], 40)
    write(root, "imu", ["imu"], 25)
    write(root, "talk", [], 11)
    write(root, "both", ["image", "imu"], 16)
    return root


def batch_of(plan: Plan, step: int = 0, **keys: object) -> PackedBatch:
    return Reader(plan.corpus, **keys).read(plan.step(step, 1).ranks[0][0])  # type: ignore[arg-type]


def texts(batch: PackedBatch) -> list[list[int]]:
    return [piece.tolist() for piece in batch.input_ids.split(list(batch.text_token_counts))]


def test_a_batch_holds_what_the_plan_names(root: Path) -> None:
    plan = open_plan(root, MIXTURE, augment=False, pack_llm_tokens=4096, pack_encoder_tokens=20_000)
    micro = plan.step(0, 1).ranks[0][0]
    batch = Reader(plan.corpus).read(micro)
    assert batch.sample_ids == tuple(plan.corpus.sample_ids(micro.samples))
    assert batch.modalities == tuple(plan.corpus.spans[ref.dataset] for ref in micro.samples)
    assert batch.weights.tolist() == [1.0] * 12
    assert batch.supervised is not None
    assert torch.equal(batch.labels[batch.supervised], batch.labels[batch.labels != IGNORE])
    assert len(batch.supervised) == plan.step(0, 1).global_valid_tokens
    assert not batch.skipped_samples
    assert not batch.is_empty
    seen = {"image": 0, "imu": 0}
    for ref, ids, spans in zip(micro.samples, texts(batch), batch.modalities, strict=True):
        parts = read_parts(
            plan.corpus.datasets[ref.dataset], plan.corpus.shards[ref.dataset][ref.shard], ref.row
        )
        assert ids == plan.corpus.text_encoder.encode(parts)[0]
        for name in spans:
            kind = plan.corpus.modalities[name]
            found = {role: parts[extension] for role, extension in kind.match(parts).items()}
            expected = kind.transform(
                kind.decode(found, {}), train=False, rng=np.random.default_rng(0)
            )
            assert torch.equal(make_input(name, batch.values[name][seen[name]]), expected)
            seen[name] += 1
    assert {name: len(batch.values[name]) for name in seen} == seen
    assert batch.values["fmri"].shape == (0, 1, 15724)


def test_augmentation_depends_on_sample_epoch_and_seed_alone(root: Path) -> None:
    mixture = {"pic": 1.0}
    by_name: dict[str, torch.Tensor] = {}
    for world_size in (1, 3):
        plan = open_plan(root, mixture, global_batch=8)
        for rank in plan.step(0, world_size).ranks:
            for micro in rank:
                batch = Reader(plan.corpus).read(micro)
                for name, value in zip(batch.sample_ids, batch.values["image"], strict=True):
                    assert torch.equal(by_name.setdefault(name, value), value)
    assert len(by_name) == 8
    plan = open_plan(root, mixture, global_batch=40)
    first, second = batch_of(plan, 0), batch_of(plan, 1)
    before = {
        name.removesuffix("@0"): value
        for name, value in zip(first.sample_ids, first.values["image"], strict=True)
    }
    after = {
        name.removesuffix("@1"): value
        for name, value in zip(second.sample_ids, second.values["image"], strict=True)
    }
    changed = [not torch.equal(before[name], after[name]) for name in before.keys() & after.keys()]
    assert changed
    assert all(changed)


def test_an_empty_micro_batch_is_one_bos_of_zero_weight(root: Path) -> None:
    plan = open_plan(root, MIXTURE, global_batch=1)
    micro = next(rank[0] for rank in plan.step(0, 2).ranks if rank[0].is_empty)
    batch = Reader(plan.corpus).read(micro)
    assert batch.input_ids.tolist() == [plan.corpus.text_encoder.bos]
    assert batch.labels.tolist() == [IGNORE]
    assert (batch.text_token_counts, batch.modalities, batch.weights.tolist(), batch.is_empty) == (
        (1,),
        ((),),
        [0.0],
        True,
    )
    assert batch.sample_ids == ()
    assert {name: len(value) for name, value in batch.values.items()} == {
        "image": 0,
        "imu": 0,
        "fmri": 0,
    }


def test_a_corrupt_sample_is_skipped_and_nothing_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, "pic", ["image"], 20, broken=[9])
    write(tmp_path / "whole", "pic", ["image"], 20)
    plan, whole = (
        open_plan(tmp_path, {"pic": 1}, global_batch=20),
        open_plan(tmp_path / "whole", {"pic": 1}, global_batch=20),
    )
    assert plan.digest(0) == whole.digest(0)
    batch, expected = batch_of(plan), batch_of(whole)
    assert batch.sample_ids == expected.sample_ids
    at = batch.sample_ids.index("pic/train-000001/pic-0009@0")
    assert list(batch.skipped_samples) == [at]
    assert "pic/train-000001/pic-0009@0" in batch.skipped_samples[at]
    assert batch.text_token_counts == expected.text_token_counts
    assert batch.weights.tolist() == [float(i != at) for i in range(len(batch.sample_ids))]
    assert not batch.values["image"][at].any()
    assert batch.values["image"].shape == expected.values["image"].shape
    for i in range(len(batch.sample_ids)):
        if i != at:
            assert torch.equal(batch.values["image"][i], expected.values["image"][i])
            assert texts(batch)[i] == texts(expected)[i]
    labels = batch.labels.split(list(batch.text_token_counts))[at]
    assert (labels == IGNORE).all()


UNEXPECTED = [StopIteration(), struct.error("cut"), RecursionError(), AssertionError("odd")]


@pytest.mark.parametrize(
    "error", UNEXPECTED, ids=["StopIteration", "struct", "RecursionError", "AssertionError"]
)
def test_an_unexpected_exception_of_a_decoder_skips_the_sample(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plan = open_plan(root, {"pic": 1}, global_batch=4)
    expected = batch_of(plan)
    decode, calls = plan.corpus.modalities["image"].decode, iter([error])

    def failing_once(*given: object) -> object:
        for once in calls:
            raise once
        return decode(*given)  # type: ignore[arg-type]

    monkeypatch.setitem(
        vars(plan.corpus),
        "modalities",
        {
            **plan.corpus.modalities,
            "image": _Decoding(plan.corpus.modalities["image"], failing_once),
        },
    )
    batch = batch_of(plan)
    assert batch.sample_ids == expected.sample_ids
    assert list(batch.skipped_samples) == [0]
    assert (
        f"{batch.sample_ids[0]}: unreadable image: {type(error).__name__}"
        in batch.skipped_samples[0]
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        OSError(24, "Too many open files"),
        RuntimeError("can't allocate memory"),
    ],
)
def test_a_fault_of_the_machine_skips_no_sample(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plan = open_plan(root, {"pic": 1}, global_batch=4)

    def failing(*_: object) -> object:
        raise error

    monkeypatch.setitem(
        vars(plan.corpus),
        "modalities",
        {**plan.corpus.modalities, "image": _Decoding(plan.corpus.modalities["image"], failing)},
    )
    with pytest.raises(OneLLMError, match=r"sample pic/.*, image: ") as caught:
        batch_of(plan)
    assert not isinstance(caught.value, SampleError)


class _Decoding:
    """A modality with another decoder."""

    def __init__(self, kind: Modality, decode: Callable[..., object]) -> None:
        self._kind, self.decode = kind, decode

    def __getattr__(self, name: str) -> object:
        return getattr(self._kind, name)


def test_a_flipped_byte_skips_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0,))
    dataset = write(tmp_path, "imu", ["imu"], 7)
    plan = open_plan(tmp_path, {"imu": 1}, global_batch=7)
    shard = dataset.shards()[0]
    place = dataset.index(shard).parts(3)["imu.npy"]
    with dataset.tar_path(shard).open("r+b") as file:
        file.seek(place.offset + 500)
        byte = file.read(1)
        file.seek(place.offset + 500)
        file.write(bytes([byte[0] ^ 1]))
    batch = batch_of(plan)
    assert [batch.sample_ids[i] for i in batch.skipped_samples] == ["imu/train-000000/imu-0003@0"]
    assert "CRC" in next(iter(batch.skipped_samples.values()))


class FailingReads:
    """Reads of one row that fail a number of times and then work."""

    def __init__(self, row: int, times: int, error: OSError) -> None:
        self.row, self.times, self.error, self.calls = row, times, error, 0

    def __call__(self, dataset: object, shard: object, row: int, *rest: object) -> object:
        if row == self.row:
            self.calls += 1
            if self.calls <= self.times:
                raise SampleError("a fault") from self.error
        return parts_module.read_span(dataset, shard, row, *rest)  # type: ignore[arg-type]


def test_a_read_that_fails_once_skips_no_sample(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    plan = open_plan(root, {"talk": 1}, global_batch=11)
    expected = batch_of(plan)
    reads = FailingReads(2, 2, OSError(5, "Input/output error"))
    monkeypatch.setattr(retry, "read_span", reads)
    batch = batch_of(plan)
    assert not batch.skipped_samples
    assert reads.calls == 2 + 2  # row 2 of both shards
    assert torch.equal(batch.input_ids, expected.input_ids)
    monkeypatch.setattr(retry, "read_span", FailingReads(2, 99, OSError(5, "Input/output error")))
    failed = batch_of(plan)
    assert {failed.sample_ids[i].split("/")[2] for i in failed.skipped_samples} == {
        "talk-0002@0",
        "talk-0009@0",
    }


def test_an_index_that_fails_once_does_no_harm(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0,))
    plan, failures = open_plan(root, {"talk": 1}, global_batch=11), [1, 1]
    expected = plan.corpus.sample_ids(plan.samples(0))
    works = type(plan.corpus.datasets[0]).index

    def index(dataset: Dataset, shard: ShardInfo) -> ShardIndex:
        if failures:
            failures.pop()
            raise OneLLMError("no index") from OSError(116, "Stale file handle")
        return works(dataset, shard)

    monkeypatch.setattr(type(plan.corpus.datasets[0]), "index", index)
    with pytest.raises(OneLLMError, match="no index"):
        plan.corpus.sample_id(plan.samples(0)[0])  # fails again, without a retry
    failures.append(1)
    assert plan.corpus.sample_ids(plan.samples(0)) == expected
    assert not failures


def test_a_reader_can_be_pickled(root: Path) -> None:
    plan = open_plan(root, MIXTURE)
    micro = plan.step(1, 2).ranks[1][0]
    here, there = (
        Reader(plan.corpus).read(micro),
        pickle.loads(pickle.dumps(Reader(plan.corpus))).read(pickle.loads(pickle.dumps(micro))),
    )
    assert here.sample_ids == there.sample_ids
    assert torch.equal(here.input_ids, there.input_ids)
    assert all(torch.equal(here.values[name], there.values[name]) for name in here.values)


def test_samples_skipped_by_an_earlier_start_are_not_tried_again(root: Path) -> None:
    plan = open_plan(root, MIXTURE)
    name = plan.corpus.sample_ids(plan.step(0, 1).ranks[0][0].samples)[2]
    batch = batch_of(plan, skipped_samples={name: "the disk was lost"})
    assert batch.skipped_samples == {2: "the disk was lost"}
    assert batch.weights[2] == 0


def test_a_text_that_cannot_be_read_is_planned_as_a_skipped_sample(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "some", name="some", modalities=()) as writer:
        for number, text in enumerate([b"a red cube", b"caf\xe9", b"a"]):
            writer.add("train", f"k{number}", {"txt": text})
    plan = open_plan(tmp_path, {"some": 1}, global_batch=3)
    batch = batch_of(plan)
    assert [(batch.sample_ids[i], batch.text_token_counts[i]) for i in batch.skipped_samples] == [
        ("some/train-000000/k1@0", 1)
    ]
    assert "UTF-8" in next(iter(batch.skipped_samples.values()))
    assert plan.step(0, 1).global_valid_tokens == 4 + 2


def test_a_text_of_another_length_than_planned_stops(tmp_path: Path) -> None:
    dataset = write(tmp_path, "talk", [], 7)
    plan = open_plan(tmp_path, {"talk": 1}, global_batch=7)
    path = get_token_count_path(dataset, dataset.shards()[0], plan.corpus.text_encoder.fingerprint)
    pairs = np.load(path)
    pairs[4] += 1
    np.save(path, pairs)
    stale = open_plan(tmp_path, {"talk": 1}, global_batch=7)
    with pytest.raises(
        OneLLMError,
        match=rf"stale token counts .*{path.name}: sample talk/train-000000/talk-0004@0",
    ):
        batch_of(stale)


def test_a_tar_of_another_build_stops(tmp_path: Path) -> None:
    dataset = write(tmp_path, "talk", [], 7)
    plan = open_plan(tmp_path, {"talk": 1}, global_batch=7)
    with dataset.tar_path(dataset.shards()[0]).open("ab") as file:
        file.write(b"more")
    datasets = [open_dataset(dataset.root)]
    corpus = Corpus(datasets, plan.config, plan.corpus.text_encoder, 0, ["image"])
    rebuilt = Plan(corpus)
    with pytest.raises(OneLLMError, match="do not belong together"):
        batch_of(rebuilt)


def test_conversations_are_read_with_their_labels(root: Path) -> None:
    plan = open_plan(
        root,
        {"talk": 1},
        text_format="conversation",
        max_text_tokens=60,
        global_batch=4,
        pack_llm_tokens=2048,
    )
    micro = plan.step(0, 1).ranks[0][0]
    batch = Reader(plan.corpus).read(micro)
    for ref, ids, labels in zip(
        micro.samples, texts(batch), batch.labels.split(list(batch.text_token_counts)), strict=True
    ):
        parts = read_parts(plan.corpus.datasets[0], plan.corpus.shards[0][ref.shard], ref.row)
        assert (ids, labels.tolist()) == encode(parts, tokenizer(), "conversation", 60)
    assert (batch.labels >= 0).sum() == plan.step(0, 1).global_valid_tokens
