"""Indexing tars of other tools, and the errors for tars that cannot be used."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset
from shard_worlds import (
    all_bytes,
    array,
    contents,
    foreign_tar,
    picture,
    text_dataset,
    write_tree,
)

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.html.page import write_page
from onellm_dist.shards import open_dataset
from onellm_dist.shards.command import index_command
from onellm_dist.shards.format.index import ShardIndex, get_index_path
from onellm_dist.shards.format.index_tar import index_tar
from onellm_dist.shards.format.tars import TarError, scan_tar
from onellm_dist.shards.tools.index_existing import index_existing_shards

IMG2DATASET = [
    (f"{key}{e}", data)
    for key in ("000000000", "000000001")
    for e, data in ((".jpg", picture(1)), (".json", b"{}"), (".txt", b"x"))
]


def test_img2dataset_tars_become_a_dataset_in_place(tmp_path: Path) -> None:
    tars = [
        foreign_tar(tmp_path / f"0000{i}.tar", [(f"{i}{n}", d) for n, d in IMG2DATASET])
        for i in range(2)
    ]
    before = [t.read_bytes() for t in tars]
    done = index_existing_shards(tmp_path, licence="CC-BY-4.0")
    assert (done.tars, done.samples) == (2, 4)
    dataset = open_dataset(tmp_path)
    assert (dataset.modalities, dataset.manifest.text, dataset.manifest.licence) == (
        ("image",),
        ("txt", "json"),
        "CC-BY-4.0",
    )
    assert [s.name for s in dataset.shards()] == ["00000", "00001"]
    read = {
        s["__key__"]: {e: s[e] for e in ("jpg", "json", "txt")}
        for s in webdataset.WebDataset([str(t) for t in tars], shardshuffle=False)
    }
    assert contents(dataset) == read
    assert [t.read_bytes() for t in tars] == before


def test_half_a_surrogate_pair_costs_no_tar(tmp_path: Path) -> None:
    tar = foreign_tar(
        tmp_path / "0.tar",
        [("a.jpg", picture(1)), ("a.json", b'{"caption": "a\\ud83d"}'), *IMG2DATASET],
    )
    assert index_existing_shards(tmp_path).samples == 3
    write_page(
        tmp_path / "x.html", json.loads(contents(open_dataset(tar.parent))["a"]["json"])["caption"]
    )
    assert (tmp_path / "x.html").read_text() == "a?"


def test_the_key_runs_to_the_first_dot_and_extensions_are_lower_case(tmp_path: Path) -> None:
    members = [
        ("./", b""),
        ("./a.b/key1.NSDgeneral.NPY", array((2,))),
        ("./a.b/key1.txt", b"x"),
        ("__meta__/info.json", b"{}"),
        ("README", b"no part"),
    ]
    index = ShardIndex(index_tar(foreign_tar(tmp_path / "x.tar", members)))
    assert index.keys() == ["./a.b/key1"]
    assert set(index.parts(0)) == {"nsdgeneral.npy", "txt"}


def test_links_and_folders_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (
            ("dir.x", tarfile.DIRTYPE),
            ("a.txt", tarfile.REGTYPE),
            ("b.txt", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.txt" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
    assert ShardIndex(index_tar(tmp_path / "x.tar")).keys() == ["a"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_hold_in_every_tar_format(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12 + "k" * 60
    members = [
        ("a.txt", b"one"),
        (f"{long}.json", b'{"caption": "two"}'),
        (f"{long}.jpg", picture(1)),
        ("z.txt", b"x" * 512),
    ]
    tar = foreign_tar(tmp_path / "x.tar", members, format)
    index = ShardIndex(index_tar(tar))
    data = tar.read_bytes()
    found = {
        f"{index.key(r)}.{e}": data[p.offset : p.offset + p.size]
        for r in range(3)
        for e, p in index.parts(r).items()
    }
    assert found == dict(members)


@pytest.mark.parametrize("cut", [100, 512, 600, 1024, 1536, 2000, 2049, 3600, 4095, 4096, 4300])
def test_a_tar_that_is_cut_anywhere_is_truncated_and_leaves_no_index(
    tmp_path: Path, cut: int
) -> None:
    """Three samples of one 600-byte part: headers at 0, 1536, 3072; the end marker at 4608."""
    tar = foreign_tar(tmp_path / "x.tar", [(f"k{i}.txt", bytes([65 + i]) * 600) for i in range(3)])
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(TarError, match=r"x\.tar.*at offset \d+.*(truncated|not a tar)"):
        index_tar(tar)
    assert list(all_bytes(tmp_path)) == ["x.tar"]


def test_a_cut_inside_a_part_names_key_part_and_offset(tmp_path: Path) -> None:
    tar = foreign_tar(tmp_path / "x.tar", [("a.txt", b"1"), ("b.jpg", picture(1)), ("b.txt", b"2")])
    tar.write_bytes(tar.read_bytes()[: 3 * 512 + 100])
    with pytest.raises(
        TarError,
        match=r"x\.tar, key b, at offset 1536: "
        rf"truncated: part \.jpg has 100 of its {len(picture(1))} bytes",
    ):
        index_tar(tar)


def test_a_missing_end_marker_and_a_damaged_header_are_not_the_end(tmp_path: Path) -> None:
    """Python's tarfile takes both for the end of the archive."""
    tar = foreign_tar(tmp_path / "x.tar", [(f"k{i}.txt", b"x" * 600) for i in range(3)])
    whole = tar.read_bytes()
    tar.write_bytes(whole[:4608])
    with pytest.raises(TarError, match="at offset 4608: truncated: it ends without"):
        index_tar(tar)
    damaged = bytearray(whole)
    damaged[1536 + 150] ^= 0xFF  # the second header's checksum
    tar.write_bytes(damaged)
    with pytest.raises(TarError, match="key k0, at offset 1536: damaged"):
        index_tar(tar)
    tar.write_bytes(whole + whole)
    with pytest.raises(TarError, match="data follows the end-of-archive marker"):
        index_tar(tar)


def test_duplicate_keys_and_parts_name_both_places(tmp_path: Path) -> None:
    tar = foreign_tar(tmp_path / "x.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.jpg", b"3")])
    with pytest.raises(
        TarError,
        match=r"x\.tar, key a, at offset 2048: duplicate key: its first sample starts at offset 0",
    ):
        index_tar(tar)
    foreign_tar(tar, [("a.txt", b"1"), ("a.TXT", b"2")])
    with pytest.raises(
        TarError,
        match=r"key a, at offset 1024: duplicate part \.txt: the other begins at offset 512",
    ):
        index_tar(tar)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"hello world " * 100, "not a tar"),
        (gzip.compress(b"x" * 2000, mtime=0), "compressed .gzip."),
        (b"\x28\xb5\x2f\xfd" + b"x" * 2000, "compressed .zstd."),
        (b"\x00" * 10240, "no sample"),
    ],
)
def test_what_is_no_tar(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(TarError, match=message):
        index_tar(tmp_path / "x.tar")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1"
    ) as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.txt"))
    with pytest.raises(TarError, match="is not UTF-8"):
        scan_tar(tmp_path / "x.tar")


def test_an_error_survives_the_way_from_a_worker(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(TarError(tmp_path / "x.tar", "broken", "k", 5)))
    assert (error.key, error.offset, error.what) == (
        "k",
        5,
        f"{tmp_path}/x.tar, key k, at offset 5: broken.",
    )


def test_a_failed_new_index_leaves_the_old_one(tmp_path: Path) -> None:
    tar = foreign_tar(tmp_path / "x.tar", [("a.txt", b"1")])
    old = index_tar(tar).read_bytes()
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(TarError):
        index_tar(tar)
    assert (tmp_path / "x.tar.index").read_bytes() == old


def test_splits_come_from_names(tmp_path: Path) -> None:
    names = {
        "train/train_subj01_0": "train",
        "val/val_subj01_0": "val",
        "00007": "train",
        "coco-test-3": "test",
        "trainees": "train",
        "latest": "train",
    }
    for i, name in enumerate(names):
        foreign_tar(
            tmp_path / f"{name}.tar", [(f"k{i}.nsdgeneral.npy", array((3, 4))), (f"k{i}.txt", b"x")]
        )
    assert index_existing_shards(tmp_path, modalities=("fmri",)).samples == 6
    dataset = open_dataset(tmp_path)
    assert {s.name: s.split for split in dataset.splits for s in dataset.shards(split)} == {
        n.replace("/", "__"): s for n, s in names.items()
    }
    index_existing_shards(tmp_path, modalities=("fmri",), split="all")
    assert open_dataset(tmp_path).splits == ("all",)


def test_no_two_shards_have_one_name(tmp_path: Path) -> None:
    for i, name in enumerate(("a/b", "a__b")):
        foreign_tar(tmp_path / f"{name}.tar", [(f"k{i}.txt", b"x")])
    with pytest.raises(UsageError, match=r"a/b\.tar, a__b\.tar"):
        index_existing_shards(tmp_path, modalities=())


def test_all_bad_tars_are_reported_and_no_manifest_is_written(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "0.tar", IMG2DATASET)
    (tmp_path / "1.tar").write_bytes(b"")
    (tmp_path / "2.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:900])
    with pytest.raises(OneLLMError, match=r"1\.tar(.|\n)*2\.tar(.|\n)*2 of 3 tars") as caught:
        index_existing_shards(tmp_path)
    assert caught.value.exit_code == 1
    assert sorted(all_bytes(tmp_path)) == ["0.tar", "0.tar.index", "1.tar", "2.tar"]


def test_every_sample_must_have_the_modalitys_parts(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "0.tar", [*IMG2DATASET, ("lonely.txt", b"x")])
    with pytest.raises(OneLLMError, match=r"0\.tar, key lonely, at offset \d+: no image part"):
        index_existing_shards(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_an_extension_of_several_modalities_must_be_named(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "0.tar", [("a.npy", array((6, 400))), ("a.txt", b"x")])
    with pytest.raises(UsageError, match="modality=NAME") as caught:
        index_existing_shards(tmp_path)
    assert "imu" in caught.value.what
    assert "fmri" in caught.value.what
    assert index_existing_shards(tmp_path, modalities=("imu",)).samples == 1
    assert open_dataset(tmp_path).modalities == ("imu",)


def test_a_builders_manifest_is_kept_and_its_indexes_are_made_again(tmp_path: Path) -> None:
    dataset = text_dataset(
        tmp_path / "set", {f"k{i}": {"txt": b"x"} for i in range(4)}, max_samples=2
    )
    whole = all_bytes(dataset.root)
    for path in dataset.root.rglob("*.index"):
        path.unlink()
    index_existing_shards(dataset.root)
    assert all_bytes(dataset.root) == whole
    other = text_dataset(tmp_path / "other", {"z": {"txt": b"another"}})
    tar = dataset.tar_path(dataset.shards()[0])
    tar.write_bytes(other.tar_path(other.shards()[0]).read_bytes())
    with pytest.raises(OneLLMError, match="do not belong together"):
        index_existing_shards(dataset.root)


def test_tars_whose_index_fits_are_not_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = [foreign_tar(tmp_path / f"{i}.tar", IMG2DATASET) for i in range(6)]
    assert index_existing_shards(tmp_path, again=False).kept == 0
    before = all_bytes(tmp_path)
    data = bytearray(get_index_path(tars[0]).read_bytes())
    data[-100] ^= 1
    get_index_path(tars[0]).write_bytes(data)  # damaged
    os.utime(tars[1], ns=(0, get_index_path(tars[1]).stat().st_mtime_ns + 1))  # written later
    get_index_path(tars[2]).unlink()
    get_index_path(tars[3]).write_bytes(get_index_path(tars[4]).read_bytes())  # of another tar
    assert index_command([tmp_path], [], workers=1) == 0
    assert (
        "6 tars, 12 samples indexed (2 had an index already); it is a dataset now"
        in capsys.readouterr().out
    )
    assert all_bytes(tmp_path) == before
    assert index_existing_shards(tmp_path).kept == 0


def test_what_looks_like_a_tar_and_is_not_read_is_named(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "0.tar", IMG2DATASET)
    others = ("1.zip", "2.tar.part", "3.TAR", "4.7z", "5.tar.gz.001", "6.tar.aria2")
    packed = ("a/1.tgz", "a/2.txz", "a/3.tar.lz4", "a/4.TAR.BZ2")
    write_tree(tmp_path, dict.fromkeys((*others, *packed, "0.tar.idx", "0.parquet"), b"x"))
    done = index_existing_shards(tmp_path)
    assert done.tars == 1
    assert [note.split(": ")[0] for note in done.notes] == [
        "4 compressed tars not read (a/1.tgz, a/2.txz, a/3.tar.lz4, a/4.TAR.BZ2)",
        "6 other archives not read (1.zip, 2.tar.part, 3.TAR, 4.7z, 5.tar.gz.001, ...)",
    ]


def test_nothing_to_index(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \.tar below"):
        index_existing_shards(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        index_existing_shards(tmp_path / "x.tar")


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign_tar(tmp_path / "0.tar", IMG2DATASET)
    assert index_command([tmp_path / "0.tar"], []) == 0
    assert "1 tar, 2 samples indexed; to train from it, index its folder" in capsys.readouterr().out
    assert index_command([tmp_path], ["image"]) == 0
    assert "it is a dataset now" in capsys.readouterr().out


@pytest.mark.slow
def test_two_workers_index_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(4):
            foreign_tar(tmp_path / name / f"{i}.tar", [(f"{i}{n}", d) for n, d in IMG2DATASET])
    index_existing_shards(tmp_path / "a", name="x")
    index_existing_shards(tmp_path / "b", name="x", workers=2)
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")
