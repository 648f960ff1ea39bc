"""Names that other people wrote: keys, hidden files, folders with brackets, in tars and stores."""

from __future__ import annotations

import gzip
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from shard_worlds import all_bytes, contents, foreign_tar, picture, text_dataset
from stores import local_s3, stored, upload
from typer.testing import CliRunner

from onellm_dist.cli import app
from onellm_dist.common.errors import OneLLMError, SampleError, UsageError
from onellm_dist.common.hidden_files import has_hidden_part
from onellm_dist.shards import as_webdataset
from onellm_dist.shards.command import index_command
from onellm_dist.shards.format import tars
from onellm_dist.shards.format.dataset import open_dataset
from onellm_dist.shards.format.index import ShardIndex
from onellm_dist.shards.format.index_tar import index_tar
from onellm_dist.shards.format.tars import TarError
from onellm_dist.shards.format.valid_names import check_names, find_bad_shard_path
from onellm_dist.shards.storage.paths import move_file, remove_tree, to_storage_path
from onellm_dist.shards.tools.index_existing import index_existing_shards
from onellm_dist.shards.tools.named_samples import find_samples
from onellm_dist.shards.tools.repair import repair_dataset
from onellm_dist.shards.tools.verify import verify_command, verify_dataset

ODD = ["a[1]", "sp ace", "caf\u00e9", "cafe\u0301", "a*b", "h#y", "p%20q", "{x}", "日本", "a,b"]
BAD_KEYS = ["../x", "a/../b", "/../x", "a\nb", "a\x1b[31mb", "__x"]
FOREIGN_KEYS = ["./a", "./sub/b", "/data/img/001", "//x", "a//b", "a/./b"]
"""Building refuses them, but other tools write them (`tar -C folder .`, `tar -P`, TarWriter)."""


@pytest.mark.parametrize("key", BAD_KEYS)
def test_index_verify_and_repair_refuse_the_keys_that_building_refuses(
    tmp_path: Path, key: str
) -> None:
    with pytest.raises(SampleError, match="cannot hold this key"):
        check_names("here", key, ["txt"])
    tar = foreign_tar(tmp_path / "0.tar", [("good.txt", b"1"), (f"{key}.txt", b"2")])
    with pytest.raises(TarError, match=r"key .* at offset 1024: a key that readers would"):
        index_tar(tar)
    assert list(all_bytes(tmp_path)) == ["0.tar"]
    # An older program indexed such tars.
    foreign_tar(tar, [("good.txt", b"1"), ("other.txt", b"2")])
    index_existing_shards(tmp_path, modalities=())
    foreign_tar(tar, [("good.txt", b"1"), (f"{key}.txt", b"2")])
    assert any("would skip or take" in p.what for p in verify_dataset(tmp_path))


def test_keys_that_other_tools_write_are_accepted_as_they_are(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "0.tar", [(f"{key}.txt", key.encode()) for key in FOREIGN_KEYS])
    index_existing_shards(tmp_path, modalities=())
    assert verify_dataset(tmp_path) == [] and repair_dataset(tmp_path) == []
    dataset = open_dataset(tmp_path)
    assert {k: parts["txt"].decode() for k, parts in contents(dataset).items()} == {
        key: key for key in FOREIGN_KEYS
    }
    assert [s["__key__"] for s in as_webdataset(dataset)] == FOREIGN_KEYS
    ids = [f"{dataset.name}/0/{key}@3" for key in FOREIGN_KEYS]
    assert [s.key for s in find_samples(dataset, ids)] == FOREIGN_KEYS
    for key in FOREIGN_KEYS:
        with pytest.raises(SampleError, match="cannot hold this key"):
            check_names("here", key, ["txt"])


@pytest.mark.parametrize("damage", ["none", "index", "part", "part and index"])
def test_repair_keeps_every_intact_sample_whatever_its_key_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Version 0.1.0 indexed them all."""
    keys = [*FOREIGN_KEYS, *BAD_KEYS]
    members = [("bad.txt", b"bad"), *((f"{key}.txt", key.encode()) for key in keys)]
    tar = foreign_tar(tmp_path / "0.tar", [*members, ("last.txt", b"last")])
    with monkeypatch.context() as patch:
        patch.setattr(tars, "find_stored_key_fault", lambda _: None)
        index_existing_shards(tmp_path, modalities=())
    before = contents(open_dataset(tmp_path))
    assert list(before) == ["bad", *keys, "last"]
    if "part" in damage:
        tar.write_bytes(tar.read_bytes().replace(b"bad\0", b"dab\0", 1))
    if "index" in damage:
        (tmp_path / "0.tar.index").unlink()
    done = repair_dataset(tmp_path)
    assert bool(done) == (damage != "none")
    after = contents(open_dataset(tmp_path))
    if damage == "part":
        assert "bad" not in after
    if "part" in damage:  # without its index, no checksum says that it was changed
        del before["bad"]
    assert {key: after[key] for key in before} == before
    assert repair_dataset(tmp_path) == []


def test_hidden_files_are_skipped_inside_tars_and_beside_them_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """macOS writes an AppleDouble file `._x` for each file `x`."""
    members = []
    for i in range(3):
        members += [(f"train/._{i}.jpg", b"\0\5\x16\7"), (f"train/{i}.jpg", picture(i))]
        members += [(f"train/{i}.txt", b"x"), (f".cache/{i}.txt", b"no sample")]
    foreign_tar(tmp_path / "0.tar", members)
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".Trashes").mkdir()
    foreign_tar(tmp_path / ".Trashes/1.tar", [("x.jpg", picture(1)), ("x.txt", b"x")])
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "2.tgz").write_bytes(gzip.compress(b"x"))
    assert index_command([tmp_path], ["image"]) == 0
    printed = capsys.readouterr().out
    assert "1 tar, 3 samples indexed" in printed
    assert "6 hidden files inside tars skipped" in printed
    assert "2 hidden files beside the tars skipped" in printed
    assert "2 compressed tars not read (1.tar.gz, 2.tgz)" in printed
    assert verify_dataset(tmp_path) == [] and repair_dataset(tmp_path) == []
    dataset = open_dataset(tmp_path)
    assert list(contents(dataset)) == ["train/0", "train/1", "train/2"]
    assert [s["__key__"] for s in as_webdataset(dataset)] == list(contents(dataset))


def test_only_compressed_tars_are_named(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UsageError, match=r"1 compressed tar not read \(0\.tar\.gz\)"):
        index_existing_shards(tmp_path)


def test_a_name_that_no_dataset_can_have_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    foreign_tar(tmp_path / "0.tar", [("a.txt", b"1")])
    for name in ("../x", "", "a/b", "a\0b", ".x", "x" * 300):
        with pytest.raises(UsageError, match="dataset name"):
            index_existing_shards(tmp_path, modalities=(), name=name)
    assert list(all_bytes(tmp_path)) == ["0.tar"]


def test_a_remote_manifest_writes_nothing_outside_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path / "home/cache"))
    dataset = text_dataset(tmp_path / "set", {"a": {"txt": b"x"}})
    manifest = json.loads((dataset.root / "manifest.json").read_text())
    del manifest["checksum"]
    before = all_bytes(tmp_path)
    for change in (
        {"name": "../../../evil"},
        {"shards": [{**manifest["shards"][0], "path": "../x.tar"}]},
    ):
        fsspec.filesystem("memory").pipe_file(
            "/evil/manifest.json", json.dumps({**manifest, **change}).encode()
        )
        with pytest.raises(UsageError, match=r"memory://evil/manifest\.json: (dataset name|shard)"):
            open_dataset("memory://evil")
    assert all_bytes(tmp_path) == before


@given(st.text(max_size=12), st.sampled_from(["", "/", "../", "a/", "./", "a/../", "\0"]))
def test_a_shard_path_that_is_accepted_stays_in_its_folder(name: str, before: str) -> None:
    path = f"{before}{name}.tar"
    if find_bad_shard_path([path]) is None:
        folder = Path("/data/set")
        assert str((folder / path).resolve()).startswith("/data/set/")
        path.encode()


@given(st.lists(st.sampled_from(["a", ".a", ".", "..", "._a.jpg", "a.b"]), min_size=1))
def test_a_path_is_hidden_if_one_of_its_parts_is(parts: list[str]) -> None:
    assert has_hidden_part("/".join(parts)) == any(p in (".a", "._a.jpg") for p in parts)


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "s3":
        with local_s3("lake") as url:
            yield url
    else:
        yield "memory://lake"
        fsspec.filesystem("memory").rm("/lake", recursive=True)


def test_names_in_stores_are_no_patterns(store: str) -> None:
    beside = to_storage_path(f"{store}/a1/keep.tar")
    beside.write_bytes(b"keep")
    for name in ODD:
        folder = to_storage_path(f"{store}/{name}")
        tar = folder / f"{name}.tar"
        tar.write_bytes(b"data")
        (folder / "sub" / "x.txt").write_bytes(b"y")
        assert [str(p) for p in folder.glob("*.tar")] == [str(tar)]
        assert sorted(p.name for p in folder.rglob("*.t*")) == sorted([tar.name, "x.txt"])
        assert {p.name for p in folder.iterdir()} == {tar.name, "sub"}
        assert [p.name for p in folder.glob("*/*.txt")] == ["x.txt"]
        move_file(tar, folder / f"2{name}.tar")
        assert not tar.exists() and (folder / f"2{name}.tar").read_bytes() == b"data"
        remove_tree(folder)
        assert not folder.exists()
    assert beside.read_bytes() == b"keep"


def test_a_dataset_in_a_store_is_verified(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {f"k{i}": {"bin": bytes(range(256)) * (i + 1), "txt": b"x"} for i in range(4)}
    dataset = text_dataset(tmp_path / "set", samples, max_samples=2)
    url = f"{store}/a[1]"
    upload(dataset.root, url)
    before = stored(url)
    assert verify_dataset(url) == []
    assert verify_command(Path(url)) == 0  # a command line may make a Path of a URL
    assert f"{url}: every byte is as it was written" in capsys.readouterr().out
    place = dataset.index(dataset.shards()[0]).parts(1)["bin"]
    data = bytearray(before["shards/train-000000.tar"])
    data[place.offset + 3] ^= 1
    files, base = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{base}/shards/train-000000.tar", bytes(data))
    files.rm_file(f"{base}/shards/train-000001.tar.index")
    files.pipe_file(f"{base}/shards/extra.tar", b"")
    files.invalidate_cache()
    found = verify_dataset(url)
    assert [(p.shard, p.key) for p in found] == [
        ("shards/train-000000.tar", "k1"),
        ("shards/train-000001.tar.index", None),
        ("shards/extra.tar", None),
    ]
    assert "fails its CRC-32" in found[0].what and found[1].what == "missing index"
    assert verify_command(store) == 1  # a folder of datasets
    with pytest.raises(UsageError, match=r"nothing/manifest\.json cannot be read"):
        verify_dataset(f"{store}/nothing")


def test_webdataset_reads_the_keys_that_the_index_has(tmp_path: Path) -> None:
    tar = foreign_tar(tmp_path / "0.tar", [("a.txt", b"1"), ("b/c.d.txt", b"2"), ("b/e.txt", b"3")])
    read = [s["__key__"] for s in webdataset.WebDataset([str(tar)], shardshuffle=False)]
    assert ShardIndex(index_tar(tar)).keys() == read


def test_a_damaged_index_names_dataset_shard_and_the_command_that_makes_it_again(
    tmp_path: Path,
) -> None:
    dataset = text_dataset(tmp_path / "a set", {"a": {"txt": b"x"}, "b": {"txt": b"y"}})
    before = all_bytes(dataset.root)
    path = dataset.root / "shards/train-000000.tar.index"
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    with pytest.raises(OneLLMError, match="CRC-32") as caught:
        contents(open_dataset(dataset.root))
    assert caught.value.what.startswith("dataset texts, shard shards/train-000000.tar: ")
    command = caught.value.do.rpartition(": ")[2]
    assert command == f"onellm shards index '{dataset.root}/shards/train-000000.tar'"
    assert index_command([dataset.root / "shards/train-000000.tar"], []) == 0
    assert all_bytes(dataset.root) == before


def test_what_an_index_of_another_tar_advises_repairs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the messages, followed to the end as a shell reads them."""
    samples = {key: {"txt": key.encode()} for key in "abcd"}
    root = text_dataset(tmp_path / "a set", samples, max_samples=2).root
    before = all_bytes(root)
    first, second = (root / f"shards/train-00000{i}.tar.index" for i in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(OneLLMError, match="dataset texts, shard shards/train-000001") as caught:
        contents(open_dataset(root))
    runner, printed = CliRunner(), caught.value.do
    for verb, code in (("verify", 1), ("repair", 0), ("verify", 0)):
        command = shlex.split(printed.splitlines()[-1].rpartition(": ")[2])
        assert command == ["onellm", "shards", verb, str(root)]
        done = runner.invoke(app, command[1:])
        assert done.exit_code == code
        printed = done.stdout.strip()
    assert all_bytes(root) == before
