"""Repair corrects what verify finds, keeps every good sample, and invents nothing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from shard_worlds import all_bytes, contents, foreign_tar, text_dataset

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.index import get_index_path
from onellm_dist.shards.tools.index_existing import index_existing_shards
from onellm_dist.shards.tools.repair import repair_command, repair_dataset
from onellm_dist.shards.tools.verify import verify_dataset

SAMPLES = {f"k{i}": {"bin": bytes(range(256)) * (i + 1), "txt": b"text %d" % i} for i in range(4)}
FIRST = "shards/train-000000.tar"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two shards of two samples."""
    return text_dataset(tmp_path / "set", SAMPLES, max_samples=2)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def repaired(root: Path) -> dict[str, dict[str, bytes]]:
    """The samples after a repair that left nothing for verify to find."""
    assert repair_dataset(root)
    assert verify_dataset(root) == []
    assert repair_dataset(root) == []
    return contents(open_dataset(root))


def test_an_intact_dataset_is_left_alone(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    before = all_bytes(dataset.root)
    assert repair_command(dataset.root) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert all_bytes(dataset.root) == before


@pytest.mark.parametrize("damage", ["remove", "flip", "cut"])
def test_indexes_are_made_again(dataset: Dataset, damage: str) -> None:
    before = all_bytes(dataset.root)
    path = get_index_path(dataset.root / FIRST)
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        flip(path, len(path.read_bytes()) - 5)
    else:
        path.write_bytes(path.read_bytes()[:40])
    assert repaired(dataset.root) == SAMPLES
    assert all_bytes(dataset.root) == before


def test_a_damaged_sample_is_dropped_and_the_others_stay(dataset: Dataset) -> None:
    """A flipped byte of a tar costs at most its own sample, and the old bytes are kept."""
    tar, index = dataset.root / FIRST, dataset.index(dataset.shards()[0])
    spans = {index.key(r): index.span(r) for r in range(2)}
    start = all_bytes(dataset.root)
    for offset in sorted(random.Random(0).sample(range(len(start[FIRST])), 12)):
        for name, data in start.items():
            (dataset.root / name).write_bytes(data)
        flip(tar, offset)
        hit = {k for k, (a, b) in spans.items() if a <= offset < b}
        found = repaired(dataset.root)
        assert set(SAMPLES) - hit <= set(found), offset
        assert all(found[k] == SAMPLES[k] for k in found), offset
        for extra in ("repaired.jsonl", f"{FIRST}.damaged"):
            (dataset.root / extra).unlink(missing_ok=True)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_tar_keeps_its_complete_samples(dataset: Dataset, indexed: bool) -> None:
    tar = dataset.root / FIRST
    cut = dataset.index(dataset.shards()[0]).parts(1)["bin"].offset + 100
    tar.write_bytes(tar.read_bytes()[:cut])
    if not indexed:
        get_index_path(tar).unlink()
    assert repaired(dataset.root) == {k: SAMPLES[k] for k in ("k0", "k2", "k3")}
    assert (dataset.root / f"{FIRST}.damaged").stat().st_size == cut
    assert len((dataset.root / "repaired.jsonl").read_text().splitlines()) == 1


def test_a_missing_tar_leaves_the_manifest(dataset: Dataset) -> None:
    (dataset.root / FIRST).unlink()
    get_index_path(dataset.root / FIRST).unlink()
    assert set(repaired(dataset.root)) == {"k2", "k3"}


def test_a_key_in_two_shards_stays_in_the_first(tmp_path: Path) -> None:
    for i, text in enumerate((b"first", b"second")):
        foreign_tar(tmp_path / f"{i}.tar", [("same.txt", text), (f"own{i}.txt", b"x")])
    index_existing_shards(tmp_path, modalities=())
    assert repaired(tmp_path) == {
        "same": {"txt": b"first"},
        "own0": {"txt": b"x"},
        "own1": {"txt": b"x"},
    }
    line = json.loads((tmp_path / "repaired.jsonl").read_text())
    assert (line["key"], line["file"], line["reason"]) == (
        "same",
        "1.tar",
        "duplicate key: 0.tar has it",
    )


def test_a_tar_that_was_replaced_by_another_intact_one_is_accepted(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "0.tar", [("a.txt", b"old")])
    index_existing_shards(tmp_path, modalities=())
    foreign_tar(tmp_path / "0.tar", [("a.txt", b"new"), ("b.txt", b"x" * 20000)])
    assert set(repaired(tmp_path)) == {"a", "b"}


def test_nothing_good_left_changes_nothing(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "set", {"a": {"txt": b"x"}})
    (dataset.root / FIRST).unlink()
    before = (dataset.root / "manifest.json").read_bytes()
    with pytest.raises(OneLLMError, match="no good sample is left"):
        repair_dataset(dataset.root)
    assert (dataset.root / "manifest.json").read_bytes() == before
    with pytest.raises(UsageError):
        repair_dataset(tmp_path)


@pytest.mark.slow
def test_processes_find_the_same_faults(dataset: Dataset, tmp_path: Path) -> None:
    flip(dataset.root / FIRST, 1700)
    shutil.copytree(dataset.root, tmp_path / "copy")
    assert repair_dataset(tmp_path / "copy", workers=2) == repair_dataset(dataset.root)
    assert all_bytes(tmp_path / "copy") == all_bytes(dataset.root)
