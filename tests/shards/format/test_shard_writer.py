"""Writing datasets: what webdataset reads back, what is reproducible, and what is refused."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_worlds import all_bytes, contents, picture, text_dataset
from webdataset.tariterators import base_plus_ext

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.shards import open_dataset
from onellm_dist.shards.format.index import get_index_path
from onellm_dist.shards.format.index_tar import index_tar
from onellm_dist.shards.format.writer import DatasetWriter

SAMPLES = {
    "plain": {"jpg": picture(0), "txt": b"a caption"},
    "folder.v1/näme-2": {"depth.png": b"\x00" * 513, "png": b"", "txt": "grün".encode()},
    "x" * 150: {"json": b'{"caption": "long name"}', "nsdgeneral.npy": b"\x01" * 512},
}


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "set", SAMPLES, max_samples=2)
    urls = [str(dataset.tar_path(s)) for s in dataset.shards()]
    assert len(urls) == 2
    read = {
        s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")}
        for s in webdataset.WebDataset(urls, shardshuffle=False)
    }
    assert read == SAMPLES
    assert contents(dataset) == SAMPLES


def test_the_index_is_the_one_that_a_scan_of_the_tar_makes(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "set", SAMPLES)
    tar = dataset.tar_path(dataset.shards()[0])
    written = get_index_path(tar).read_bytes()
    index_tar(tar)
    assert get_index_path(tar).read_bytes() == written


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        text_dataset(tmp_path / name, SAMPLES, max_samples=2)
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")
    with tarfile.open(tmp_path / "a/shards/train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "onellm")}


def test_shards_are_cut_by_count_and_by_bytes_and_by_split(tmp_path: Path) -> None:
    with DatasetWriter(
        tmp_path / "set", name="s", modalities=(), max_samples=3, max_bytes=100
    ) as writer:
        for i in range(7):
            writer.add("train", f"t{i}", {"txt": b"x"})
            writer.add("test_seen", f"s{i}", {"txt": b"y" * 60})
    dataset = open_dataset(tmp_path / "set")
    assert [(s.path, s.samples) for s in dataset.shards("train")] == [
        (f"shards/train-00000{i}.tar", n) for i, n in enumerate((3, 3, 1))
    ]
    assert [s.samples for s in dataset.shards("test_seen")] == [1] * 7
    assert (dataset.samples("train"), dataset.splits) == (7, ("test_seen", "train"))


def test_the_manifest_says_which_text_every_sample_has(tmp_path: Path) -> None:
    both = text_dataset(
        tmp_path / "both", {"a": {"txt": b"x", "json": b"{}"}, "b": {"txt": b"y", "json": b"{}"}}
    )
    one = text_dataset(tmp_path / "one", {"a": {"txt": b"x", "json": b"{}"}, "b": {"txt": b"y"}})
    assert (both.manifest.text, one.manifest.text) == (("txt", "json"), ("txt",))


KEYS = st.text(min_size=1, max_size=40)
EXTENSIONS = st.text(alphabet="abcxyz0189.-ß", min_size=1, max_size=12)
SLOW_DISK = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW_DISK)
@given(
    st.dictionaries(
        KEYS,
        st.dictionaries(EXTENSIONS, st.binary(max_size=1500), min_size=1, max_size=4),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 3),
)
@pytest.mark.seconds
def test_whatever_is_accepted_comes_back(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, dict[str, bytes]], size: int
) -> None:
    """Arbitrary names are refused, or read back unchanged by us, a scan, and webdataset."""
    root = tmp_path_factory.mktemp("any") / "set"
    accepted = {}
    writer = DatasetWriter(root, name="any", modalities=(), max_samples=size)
    for key, parts in samples.items():
        try:
            writer.add("train", key, parts)
        except SampleError:
            continue
        accepted[key] = parts
    if not accepted:
        with pytest.raises(UsageError, match="no sample"):
            writer.finish()
        return
    dataset = writer.finish()
    assert contents(dataset) == accepted
    for shard in dataset.shards():
        tar = dataset.tar_path(shard)
        written = get_index_path(tar).read_bytes()
        index_tar(tar)
        assert get_index_path(tar).read_bytes() == written
        read = {
            s["__key__"]: set(s) - {"__key__", "__url__", "__local_path__"}
            for s in webdataset.WebDataset(str(tar), shardshuffle=False)
        }
        assert read == {k: set(accepted[k]) for k in dataset.index(shard).keys()}  # noqa: SIM118 - a method, not a dict's


@given(
    st.text(alphabet=st.sampled_from("ab./_-é "), min_size=1, max_size=12),
    st.text(alphabet=st.sampled_from("aB._é "), min_size=1, max_size=6),
)
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW_DISK)
@pytest.mark.seconds
def test_only_names_that_webdataset_splits_the_same_way_are_accepted(
    tmp_path_factory: pytest.TempPathFactory, key: str, extension: str
) -> None:
    writer = DatasetWriter(
        tmp_path_factory.getbasetemp() / "never-written", name="n", modalities=()
    )
    try:
        writer.add("train", key, {extension: b""})
    except SampleError:
        return
    finally:
        writer.abandon()
        for folder in (writer.root / "shards", writer.root):
            folder.rmdir()
    assert base_plus_ext(f"{key}.{extension}") == (key, extension)


@pytest.mark.parametrize(
    "key", ["", "a.b", "/a", "a/", "a//b", "../a", "a/./b", "__meta__/a", "a\nb", "a\x00", "\udcff"]
)
def test_keys_that_a_tar_cannot_hold_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(SampleError, match=re.escape(repr(key))):
        DatasetWriter(tmp_path / "set", name="n", modalities=()).add("train", key, {"txt": b""})


@pytest.mark.parametrize("extension", ["", "JPG", ".jpg", "_x", "a/b", "a\nb", "\udcff"])
def test_extensions_that_a_reader_would_not_find_are_refused(
    tmp_path: Path, extension: str
) -> None:
    with pytest.raises(SampleError, match="would not find it"):
        DatasetWriter(tmp_path / "set", name="n", modalities=()).add("train", "a", {extension: b""})


def test_a_key_is_unique_over_all_splits(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "set", name="n", modalities=())
    writer.add("train", "a", {"txt": b"1"})
    with pytest.raises(SampleError, match="was written before"):
        writer.add("test", "a", {"txt": b"2"})


def test_a_sample_must_have_what_the_modalities_need(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "set", name="n", modalities=("depth",))
    with pytest.raises(SampleError, match=r"key 'a': no depth part"):
        writer.add("train", "a", {"jpg": b"", "txt": b""})
    with pytest.raises(SampleError, match="has no parts"):
        writer.add("train", "a", {})


def _add_and_fail(writer: DatasetWriter) -> None:
    for i in range(3):
        writer.add("train", str(i), {"txt": b"x"})
    raise ZeroDivisionError


def test_a_failed_write_leaves_an_incomplete_dataset_that_is_recognised(tmp_path: Path) -> None:
    root = tmp_path / "set"
    with (
        pytest.raises(ZeroDivisionError),
        DatasetWriter(root, name="n", modalities=(), max_samples=1) as writer,
    ):
        _add_and_fail(writer)
    assert sorted(all_bytes(root)) == [
        f"shards/train-00000{i}.tar{end}" for i in range(2) for end in ("", ".index")
    ]
    with pytest.raises(UsageError, match="an incomplete dataset"):
        open_dataset(root)
    with pytest.raises(UsageError, match="an incomplete dataset"):
        DatasetWriter(root, name="n", modalities=())


def test_a_killed_writer_leaves_nothing_under_a_final_name(tmp_path: Path) -> None:
    root = tmp_path / "set"
    writer = DatasetWriter(root, name="n", modalities=())
    writer.add("train", "a", {"txt": b"x"})
    assert list(all_bytes(root)) == ["shards/train-000000.tar.staged"]
    with pytest.raises(UsageError, match="an incomplete dataset"):
        DatasetWriter(root, name="n", modalities=())
    writer.abandon()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.doc": b"x"}, "not a dataset of this program"),
        ({"shards/mine.tar": b"x"}, "not a dataset of this program"),
        ({"manifest.json": b"{}"}, "already holds"),
    ],
)
def test_other_peoples_folders_are_not_written_into(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        DatasetWriter(tmp_path, name="n", modalities=())
    assert all_bytes(tmp_path) == files


def test_a_dataset_without_samples_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="no sample"),
        DatasetWriter(tmp_path / "set", name="n", modalities=()),
    ):
        pass


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a b"])
def test_dataset_names_fit_into_sample_ids(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="dataset name"):
        DatasetWriter(tmp_path / "set", name=name, modalities=())
