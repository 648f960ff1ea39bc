"""`onellm shards preview --key` shows the sample that a run has named."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_worlds import picture
from stores import upload

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.shards.tools.named_samples import find_samples
from onellm_dist.shards.tools.preview import preview_command


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two splits; the picture of `a/k2` cannot be decoded, the key `k5` has an @."""
    with DatasetWriter(
        tmp_path / "set", name="set", modalities=("image",), max_samples=2
    ) as writer:
        for i in range(4):
            jpg = picture(i) if i != 2 else b"no picture"
            writer.add("train", f"a/k{i}", {"jpg": jpg, "txt": b"text %d" % i})
        writer.add("val", "k5@7", {"jpg": picture(5), "txt": b"\x1b[31m five"})
    return open_dataset(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a/k1", ("train-000000", 1)),
        ("a/k1@3", ("train-000000", 1)),
        ("set/train-000001/a/k2@12", ("train-000001", 0)),
        ("train-000001/a/k3", ("train-000001", 1)),
        ("k5@7", ("val-000000", 0)),
        ("set/val-000000/k5@7@0", ("val-000000", 0)),
    ],
)
def test_a_key_or_an_id_finds_its_sample(
    dataset: Dataset, name: str, place: tuple[str, int]
) -> None:
    (found,) = find_samples(dataset, [name])
    assert (found.shard.name, found.row) == place


@pytest.mark.parametrize(
    "name", ["a/k9", "set/train-000000/a/k2@0", "k1", "", "other/train-000000/a/k1"]
)
def test_a_key_that_is_not_there_is_refused_with_those_like_it(dataset: Dataset, name: str) -> None:
    with pytest.raises(UsageError, match="has no sample") as caught:
        find_samples(dataset, [name, "a/k1"])
    assert "a/k0" in caught.value.do or "a/k" in caught.value.do


def test_the_page_and_the_terminal_show_the_named_samples(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    keys = ["set/train-000001/a/k2@3", "k5@7", "k5@7"]
    assert preview_command(dataset.root, out, previews=24, keys=keys) == 0
    printed = capsys.readouterr().out
    shard = dataset.shards()[1]
    start, end = dataset.index(shard).span(0)
    assert f"{dataset.root}/{shard.path}, row 0, bytes {start} to {end}" in printed
    assert ".jpg, 10 bytes" in printed and ".txt, 6 bytes: text 2" in printed
    assert "image cannot be decoded" in printed and "\x1b" not in printed
    page = out.read_text()
    assert page.count("<figure>") == 2 and page.count("data:image/jpeg") == 1
    assert "cannot be drawn" in page and "Lengths" not in page


def test_a_damaged_part_is_said(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = dataset.tar_path(dataset.shards()[0])
    place = dataset.index(dataset.shards()[0]).parts(1)["jpg"]
    data = bytearray(tar.read_bytes())
    data[place.offset] ^= 1
    tar.write_bytes(data)
    assert preview_command(dataset.root, tmp_path / "x.html", previews=1, keys=["a/k1"]) == 0
    assert "cannot be read" in capsys.readouterr().out


def test_a_sample_in_a_store_is_shown(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path / "cache"))
    upload(dataset.root, "memory://named/a [set]")
    out = tmp_path / "x.html"
    assert preview_command("memory://named/a [set]", out, previews=2) == 0
    assert preview_command("memory://named/a [set]", out, previews=2, keys=["a/k1"]) == 0
    assert "text 1" in out.read_text()
