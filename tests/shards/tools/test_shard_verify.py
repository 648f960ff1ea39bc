"""Verify finds every fault and names shard, key and offset."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from shard_worlds import all_bytes, foreign_tar, picture, text_dataset, write_tree

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.dataset import Dataset
from onellm_dist.shards.format.index import get_index_path
from onellm_dist.shards.format.index_tar import index_tar
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.shards.tools.index_existing import index_existing_shards
from onellm_dist.shards.tools.repeated_keys import RepeatedKeyFinder, SampleRow, hash_keys
from onellm_dist.shards.tools.verify import ShardProblem, verify_command, verify_dataset

SAMPLES = {f"k{i}": {"bin": bytes(range(256)) * (i + 1), "txt": b"text %d" % i} for i in range(4)}
FIRST = "shards/train-000000.tar"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two shards of two samples."""
    return text_dataset(tmp_path / "set", SAMPLES, max_samples=2)


def only(problems: list[ShardProblem]) -> ShardProblem:
    assert len(problems) == 1, problems
    return problems[0]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_an_intact_dataset_has_no_problems(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify_dataset(dataset.root) == []
    assert verify_command(dataset.root) == 0
    assert "every byte is as it was written" in capsys.readouterr().out


def test_a_flipped_byte_of_a_part_names_key_and_offset(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    place = dataset.index(dataset.shards()[0]).parts(1)["bin"]
    flip(dataset.root / FIRST, place.offset + 300)
    problem = only(verify_dataset(dataset.root))
    assert (problem.shard, problem.key, problem.offset) == (FIRST, "k1", place.offset)
    assert "part .bin (512 bytes) fails its CRC-32" in problem.what
    assert verify_command(dataset.root) == 1
    assert f"{FIRST}, key k1, offset {place.offset}: part .bin" in capsys.readouterr().out


def test_every_flipped_byte_of_a_tar_is_found(dataset: Dataset) -> None:
    """Content, headers, padding, end marker: 120 places of a 10 KiB tar, always the same."""
    tar = dataset.root / FIRST
    whole = tar.read_bytes()
    index = dataset.index(dataset.shards()[0])
    content = {
        o: (index.key(r), p)
        for r in range(2)
        for p in index.parts(r).values()
        for o in range(p.offset, p.offset + p.size)
    }
    for offset in sorted(random.Random(0).sample(range(len(whole)), 120)):
        flip(tar, offset)
        problems = verify_dataset(dataset.root)
        assert problems, f"byte {offset} of {len(whole)}"
        if offset in content:
            key, place = content[offset]
            assert (only(problems).key, only(problems).offset) == (key, place.offset)
        tar.write_bytes(whole)


def test_every_flipped_byte_of_an_index_is_found(dataset: Dataset) -> None:
    path = get_index_path(dataset.root / FIRST)
    whole = path.read_bytes()
    for offset in sorted(random.Random(1).sample(range(len(whole)), 120)):
        flip(path, offset)
        problems = verify_dataset(dataset.root)
        assert [p for p in problems if p.shard == f"{FIRST}.index"], (
            f"byte {offset} of {len(whole)}"
        )
        path.write_bytes(whole)


def test_a_truncated_tar_is_named_with_every_part_that_is_lost(dataset: Dataset) -> None:
    tar = dataset.root / FIRST
    places = dataset.index(dataset.shards()[0]).parts(1)
    tar.write_bytes(tar.read_bytes()[: places["bin"].offset + 100])
    problems = verify_dataset(dataset.root)
    assert sorted((p.key or "", p.offset or 0) for p in problems) == [
        ("k1", places["bin"].offset),
        ("k1", places["txt"].offset),
    ]
    assert all(p.shard == FIRST for p in problems)
    assert any("has 100 of its 512 bytes" in p.what for p in problems)


def test_a_damaged_header_does_not_hide_flipped_parts_behind_it(dataset: Dataset) -> None:
    index = dataset.index(dataset.shards()[0])
    flip(dataset.root / FIRST, index.span(1)[0] + 150)
    flip(dataset.root / FIRST, index.parts(1)["txt"].offset)
    whats = {p.what.split(":")[0]: p.offset for p in verify_dataset(dataset.root)}
    assert whats == {
        "damaged": index.span(1)[0],
        "part .txt (6 bytes) fails its CRC-32": index.parts(1)["txt"].offset,
    }


def test_a_missing_tar_index_or_part(dataset: Dataset) -> None:
    get_index_path(dataset.root / FIRST).unlink()
    assert str(only(verify_dataset(dataset.root))) == f"{FIRST}.index: missing index"
    index_tar(dataset.root / FIRST)
    (dataset.root / FIRST).unlink()
    assert only(verify_dataset(dataset.root)).what.startswith("missing")


def test_a_rewritten_tar_makes_the_index_stale(dataset: Dataset) -> None:
    foreign_tar(
        dataset.root / FIRST,
        [
            ("k0.bin", SAMPLES["k0"]["bin"]),
            ("k0.txt", b"text 0"),
            ("k1.bin", b"short"),
            ("new.txt", b"x"),
        ],
    )
    whats = {(p.key, p.what.split(",")[0]) for p in verify_dataset(dataset.root)}
    assert ("k1", "missing part .txt: the index has it") in whats
    assert ("new", "stale index: the sample is not in it") in whats
    assert any(k == "k1" and "part .bin lies at" in w for k, w in whats)


def test_an_index_made_again_for_another_tar_is_stale(dataset: Dataset) -> None:
    foreign_tar(dataset.root / FIRST, [("k0.txt", b"x"), ("k1.txt", b"y")])
    index_tar(dataset.root / FIRST)
    problem = only(verify_dataset(dataset.root))
    assert problem.shard == f"{FIRST}.index"
    assert "stale index: made for a tar of SHA-256" in problem.what


def test_duplicate_keys_within_and_across_shards(tmp_path: Path) -> None:
    for name in ("0", "1"):
        foreign_tar(tmp_path / f"{name}.tar", [("same.txt", b"x"), (f"own{name}.txt", b"x")])
    index_existing_shards(tmp_path, modalities=())
    problem = only(verify_dataset(tmp_path))
    assert (problem.shard, problem.key, problem.what) == (
        "1.tar",
        "same",
        "duplicate key: 0.tar has it too",
    )
    foreign_tar(tmp_path / "0.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3")])
    problem = verify_dataset(tmp_path)[0]
    assert (problem.shard, problem.key, problem.offset) == ("0.tar", "a", 2048)
    assert "duplicate key" in problem.what


@pytest.mark.parametrize("capacity", [1, 7, 100, 10_000])
def test_repeated_keys_are_those_that_a_dictionary_finds(tmp_path: Path, capacity: int) -> None:
    draw = random.Random(capacity)
    shards = [
        [f"k{draw.randrange(500)}" for _ in range(draw.choice([0, 1, 100, 150]))] for _ in range(12)
    ]
    first: dict[str, SampleRow] = {}
    expected = []
    with RepeatedKeyFinder(sum(map(len, shards)), tmp_path, capacity) as finder:
        for number, keys in enumerate(shards):
            finder.add(number, hash_keys(keys))
            for row, key in enumerate(keys):
                if first.setdefault(key, SampleRow(number, row)) != (number, row):
                    expected.append((first[key], SampleRow(number, row)))
        assert len(expected) > 100
        assert finder.find_repeats() == expected
        assert len(os.listdir(tmp_path)) == (capacity < 10_000)
    assert not os.listdir(tmp_path)


def test_the_memory_of_verify_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """5 and 20 times as many samples as are held at once; 0.2 million samples take 5 MB of disk."""
    peaks = []
    for shards in (50, 200):
        tracemalloc.start()
        with RepeatedKeyFinder(shards * 1000, tmp_path, 10_000) as finder:
            for shard in range(shards):
                finder.add(
                    shard,
                    np.random.default_rng(shard).integers(0, 2**63, (1000, 2)).astype(np.uint64),
                )
            assert finder.find_repeats() == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_a_missing_part_of_the_modality_or_the_text(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, name="n", modalities=()) as writer:
        writer.add("train", "a", {"jpg": picture(0), "txt": b"x"})
        writer.add("train", "b", {"png": picture(0), "depth.png": picture(1)})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["checksum"]
    (tmp_path / "manifest.json").write_text(
        json.dumps({**manifest, "modalities": ["depth"], "text": ["txt"]})
    )
    problems = verify_dataset(tmp_path)
    assert [(p.key, p.what.split(" for ")[0].split(" the manifest")[0]) for p in problems] == [
        ("a", "missing part: no depth part"),
        ("b", "missing part .txt:"),
    ]


def test_files_that_nothing_reads(dataset: Dataset) -> None:
    write_tree(
        dataset.root,
        {"shards/extra.tar": b"", "shards/train-000009.tar.staged": b"", "shards/notes.md": b""},
    )
    assert {
        (p.shard, p.what.split(":")[0].split(" from")[0]) for p in verify_dataset(dataset.root)
    } == {
        ("shards/extra.tar", "not in the manifest"),
        ("shards/train-000009.tar.staged", "left by a writer that was stopped; it may be removed"),
    }


def test_a_folder_of_datasets_is_verified_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        text_dataset(tmp_path / name, SAMPLES)
    assert verify_command(tmp_path) == 0
    flip(tmp_path / "b" / FIRST, 600)
    assert verify_command(tmp_path) == 1
    assert (
        f"{tmp_path}/a: every byte is as it was written\n{FIRST}, key k0" in capsys.readouterr().out
    )


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no manifest"):
        verify_dataset(tmp_path)


@pytest.mark.slow
def test_two_workers_find_the_same(dataset: Dataset) -> None:
    for shard in dataset.shards():
        flip(dataset.tar_path(shard), dataset.index(shard).parts(0)["bin"].offset)
    before = all_bytes(dataset.root)
    assert verify_dataset(dataset.root) == verify_dataset(dataset.root, workers=2)
    assert len(verify_dataset(dataset.root)) == 2
    assert all_bytes(dataset.root) == before
