"""A dataset as a plain webdataset pipeline: the samples of our own reader, each once an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image
from shard_worlds import contents, picture
from torch.utils.data import DataLoader

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards import as_webdataset, open_dataset
from onellm_dist.shards.format.writer import DatasetWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in shards of 4: 22 for training, 5 for validation."""
    with DatasetWriter(
        tmp_path / "set", name="set", modalities=("image",), max_samples=4
    ) as writer:
        for number in range(22):
            parts = {"jpg": picture(number), "txt": f"caption {number}".encode()}
            if number % 2:
                parts["json"] = b'{"number": %d}' % number
            writer.add("train", f"folder/{number:03d}", parts)
        for number in range(5):
            writer.add("val", f"v{number}", {"jpg": picture(100 + number), "txt": b"a caption"})
    return tmp_path / "set"


def strip(sample: dict[str, Any]) -> dict[str, bytes]:
    """The parts of a sample of webdataset."""
    return {name: data for name, data in sample.items() if not name.startswith("__")}


def test_the_samples_are_those_of_our_reader(folder: Path) -> None:
    dataset = open_dataset(folder)
    for split in ("train", "val"):
        found = {s["__key__"]: strip(s) for s in as_webdataset(dataset, split=split)}
        assert found == contents(dataset, split)
    assert list(found) == [f"v{number}" for number in range(5)]  # in the order of the tars
    first = next(iter(as_webdataset(folder)))
    assert first["__url__"] == f"{folder}/shards/train-000000.tar"


def test_a_missing_split_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="has no split 'test'"):
        as_webdataset(folder, split="test")
    with pytest.raises(UsageError, match="shuffle=-1 is negative"):
        as_webdataset(folder, shuffle=-1)


@pytest.mark.parametrize("shuffle", [0, 8])
def test_two_workers_read_each_sample_once_an_epoch(folder: Path, shuffle: int) -> None:
    dataset = open_dataset(folder)
    loader: DataLoader[dict[str, Any]] = DataLoader(
        as_webdataset(dataset, shuffle=shuffle, seed=3),
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
    )
    orders = []
    for _ in range(2):
        samples = list(loader)
        assert {s["__key__"]: strip(s) for s in samples} == contents(dataset)
        assert set(Counter(s["__key__"] for s in samples).values()) == {1}
        orders.append([s["__key__"] for s in samples])
    assert (orders[0] == orders[1]) == (shuffle == 0)


def test_more_workers_than_shards_read_each_sample_once(folder: Path) -> None:
    loader: DataLoader[dict[str, Any]] = DataLoader(
        as_webdataset(folder, split="val"), batch_size=None, num_workers=4
    )
    assert sorted(s["__key__"] for s in loader) == [f"v{number}" for number in range(5)]


@pytest.mark.parametrize("shuffle", [0, 5])
def test_ranks_read_different_shards(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shuffle: int
) -> None:
    keys = list[str]()
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        keys += [s["__key__"] for s in as_webdataset(folder, shuffle=shuffle)]
    assert sorted(keys) == sorted(contents(open_dataset(folder)))


def test_webdatasets_own_methods_work_on_it(folder: Path) -> None:
    pairs = list(as_webdataset(folder, split="val").decode("pil").to_tuple("jpg", "txt"))
    assert [text for _, text in pairs] == ["a caption"] * 5
    assert all(isinstance(image, Image.Image) and image.size == (32, 24) for image, _ in pairs)


def test_a_remote_dataset_is_read_from_its_store(folder: Path) -> None:
    store = fsspec.filesystem("memory")
    try:
        for path in folder.rglob("*"):
            if path.is_file():
                store.pipe_file(f"/wds/{path.relative_to(folder)}", path.read_bytes())
        samples = list(as_webdataset("memory://wds"))
        assert {s["__key__"]: strip(s) for s in samples} == contents(open_dataset(folder))
        assert samples[0]["__url__"] == "memory://wds/shards/train-000000.tar"
    finally:
        store.rm("/wds", recursive=True)


def test_a_shard_that_cannot_be_opened_is_an_error_or_skipped(folder: Path) -> None:
    dataset = open_dataset(folder)
    (folder / "shards/train-000001.tar").unlink()
    with pytest.raises(OneLLMError, match=r"train-000001\.tar: No such file"):
        list(as_webdataset(dataset))
    errors = list[Exception]()

    def skip(error: Exception) -> bool:
        errors.append(error)
        return True

    assert len(list(as_webdataset(dataset, handler=skip))) == 18
    assert len(errors) == 1
