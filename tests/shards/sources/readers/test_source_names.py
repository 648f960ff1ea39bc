"""Names and files as other systems leave them: hidden, in other forms, in splits and classes."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pytest
from pyarrow import parquet
from shard_worlds import contents, picture, split_arguments, write_tree

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.task import TooManyFailuresError
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.sources.base import BuildReport
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(4052)
TURNS = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
HIDDEN = ("._{}", ".{}", "__MACOSX/{}", "@eaDir/{}", ".ipynb_checkpoints/{}")


def build(
    tmp_path: Path, files: Mapping[str, bytes | str], source: str = "folder", **options: Any
) -> tuple[BuildReport, Dataset]:
    report = build_dataset(
        source, write_tree(tmp_path / "in", files), tmp_path / "out", **split_arguments(options)
    )
    return report, open_dataset(tmp_path / "out")


def captions(dataset: Dataset, split: str = "train") -> dict[str, str]:
    return {key: parts["txt"].decode() for key, parts in contents(dataset, split).items()}


def tar(members: Mapping[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


PAIR: dict[str, bytes | str] = {"a.jpg": picture(0), "a.txt": "x"}


@pytest.mark.parametrize("pattern", HIDDEN)
def test_hidden_files_are_skipped_and_counted(tmp_path: Path, pattern: str) -> None:
    hidden = {pattern.format(name): APPLE for name in ("a.jpg", "captions.csv", "b.json")}
    report, dataset = build(tmp_path, {**PAIR, **hidden})
    assert captions(dataset) == {"a": "x"}
    assert any("hidden" in note for note in report.notes)


@pytest.mark.parametrize("pattern", HIDDEN)
def test_hidden_files_beside_and_in_tars(tmp_path: Path, pattern: str) -> None:
    member = {"train/0.jpg": picture(0), "train/0.txt": b"x"}
    inside = {
        f"train/{pattern.format('0.jpg')}": APPLE,
        f"./train/{pattern.format('0.txt')}": APPLE,
    }
    files = {"0.tar": tar({**inside, **member}), pattern.format("0.tar"): APPLE}
    report, dataset = build(tmp_path, files, "laion400m", unfinished="take")
    assert captions(dataset) == {"train/0": "x"}
    assert "left out knowingly: 2 x hidden file in a tar" in report.notes
    assert "hidden files skipped: 1" in report.notes


@pytest.mark.parametrize("source", ["webvid", "sharegpt", "reference-lists"])
def test_hidden_tables_are_no_tables(tmp_path: Path, source: str) -> None:
    talk = [
        {"id": 1, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    ]
    tables: dict[str, tuple[dict[str, bytes | str], dict[str, str]]] = {
        "webvid": ({"r.csv": "videoid,page_dir,name\n1,a,b\n"}, {"check": "no"}),
        "sharegpt": ({"r.json": json.dumps(talk)}, {}),
        "reference-lists": ({"r.json": json.dumps(talk)}, {"modality": "text"}),
    }
    files, options = tables[source]
    films: dict[str, bytes | str] = {"videos/a/1.mp4": b"film"} if source == "webvid" else {}
    hidden = {f"._{name}": APPLE for name in files}
    report, _ = build(tmp_path, {**files, **films, **hidden}, source, **options)
    assert (report.samples, report.failures) == (1, 0)


@pytest.mark.parametrize(
    "suffix", [".tar.gz", ".tgz", ".tar.zst", ".txz", ".tbz", ".tar.lz4", ".TAR.GZ", ".tar.Z"]
)
def test_compressed_tars_are_refused_or_counted(tmp_path: Path, suffix: str) -> None:
    members = {"0.jpg": picture(0), "0.txt": b"x"}
    files: dict[str, bytes | str] = {f"1{suffix}": tar(members, "w:gz")}
    with pytest.raises(UsageError, match=rf"no tar, but 1 compressed: 1{suffix}(.|\n)*gunzip"):
        build(tmp_path, files, "laion400m")
    files |= {"0.tar": tar(members), "0_stats.json": "{}"}
    with pytest.raises(UsageError, match=rf"1 tar is compressed: 1{suffix}"):
        build(tmp_path, files, "laion400m", unfinished="take")
    report, _ = build(tmp_path, files, "laion400m", unfinished="skip")
    assert report.samples == 1
    assert f"ignored: 1 x {suffix.lower()}" in report.notes


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("layout", ["table", "side", "deep", "list"])
def test_either_unicode_form_is_found(
    tmp_path: Path, stored: Literal["NFC", "NFD"], layout: str
) -> None:
    other: Literal["NFC", "NFD"] = "NFD" if stored == "NFC" else "NFC"
    names = ["café", "Zürich", "Ångström ﬁ", "plain"]
    on_disk = [unicodedata.normalize(stored, name) for name in names]
    written = [unicodedata.normalize(other, name) for name in names]
    files: dict[str, bytes | str] = {
        f"é{d}/{d}.jpg" if layout == "deep" else f"{d}.jpg": picture(i)
        for i, d in enumerate(on_disk)
    }
    if layout == "side":
        files |= {f"{w}.txt": w for w in written}
    elif layout == "list":
        rows = [{"image": f"{w}.jpg", "caption": w} for w in written]
        files["list.json"] = json.dumps(rows)
    else:
        # the folder's é stays as it is on disk, the rest of the path has the other form
        paths = [f"é{w}/{w}.jpg" if layout == "deep" else f"{w}.jpg" for w in written]
        files["t.csv"] = "file,caption\n" + "".join(
            f"{p},{w}\n" for p, w in zip(paths, written, strict=True)
        )
    report, dataset = build(tmp_path, files)
    assert (report.samples, report.failures) == (4, 0)
    assert sorted(captions(dataset).values()) == sorted(written)
    assert any(f"/{on_disk[0]}" in f"/{key}" for key in captions(dataset))


def test_two_files_of_one_look_stay_two(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
    for form in forms:
        name = unicodedata.normalize(form, "é")
        files |= {f"{name}.jpg": picture(len(name)), f"{name}.txt": form}
    _, dataset = build(tmp_path, files)
    assert sorted(captions(dataset).values()) == ["NFC", "NFD"]


def test_a_missing_file_that_differs_in_case_is_named(tmp_path: Path) -> None:
    table = "file,caption\na.jpg,x\nb.jpg,y\n"
    files: dict[str, bytes | str] = {"A.JPG": picture(0), "b.jpg": picture(1), "t.csv": table}
    report, _ = build(tmp_path, files, max_failures=0.5)
    assert f"(looked for in {tmp_path / 'in'}; A.JPG lies there" in report.quarantined[0].reason


def test_names_that_differ_in_dots_are_distinguished(tmp_path: Path) -> None:
    names = ["22.05", "22_05", "a.b.c", "a.b_c", "a_b_c", "22_05-2"]
    files: dict[str, bytes | str] = {}
    for i, name in enumerate(names):
        files |= {f"{name}.jpg": picture(i), f"{name}.txt": name}
    report, dataset = build(tmp_path, files)
    found = captions(dataset)
    assert report.failures == 0
    assert sorted(found.values()) == sorted(names)
    assert (found["22_05"], found["22_05-2"], found["a_b_c"]) == ("22_05", "22_05-2", "a_b_c")
    assert "names that differ in dots alone: 3 keys got a number" in report.notes


def test_made_up_keys_are_unique() -> None:
    assert make_keys_unique(["a", "a", "a-2", "a"]) == ["a", "a-3", "a-2", "a-4"]
    assert make_keys_unique(["a", "a"], [False, True]) == ["a-2", "a"]


def test_lists_of_one_stem_are_distinguished(tmp_path: Path) -> None:
    row = json.dumps(
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    )
    files = {"a.json": f"[{row}]", "a.jsonl": row, "a.b.json": f"[{row}]", "a_b.json": f"[{row}]"}
    report, _ = build(tmp_path, files, "sharegpt")
    assert (report.samples, report.failures) == (4, 0)


def test_a_caption_named_after_the_complete_file(tmp_path: Path) -> None:
    _, dataset = build(tmp_path, {"a.jpg": picture(0), "a.jpg.txt": "x"})
    assert captions(dataset) == {"a": "x"}


@pytest.mark.parametrize("name", ["a [b]", "a*b?", "a#b%20c", "a'b\"c", " a ", "-a", "a\\b", "a:b"])
def test_names_of_any_characters(tmp_path: Path, name: str) -> None:
    _, dataset = build(tmp_path, {f"{name}/{name}.jpg": picture(0), f"{name}/{name}.txt": "x"})
    assert captions(dataset) == {f"{name}/{name}": "x"}


SPLITS = {"train": ("train", 3), "validation": ("val", 2), "test": ("test", 1)}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "side", "classes"])
@pytest.mark.seconds
def test_folders_of_splits(tmp_path: Path, kind: str) -> None:
    files: dict[str, bytes | str] = {"README.md": "x", ".DS_Store": b""}
    for folder, (_, count) in SPLITS.items():
        rows = []
        for i in range(count):
            name = f"{'cat' if i % 2 else 'dog'}/{i}" if kind == "classes" else str(i)
            files[f"{folder}/{name}.png"] = picture(i, "PNG")
            rows.append({"file_name": f"{name}.png", "text": f"{folder} {i}"})
            if kind == "side":
                files[f"{folder}/{name}.txt"] = f"{folder} {i}"
        tables = {
            "jsonl": "\n".join(map(json.dumps, rows)),
            "json": json.dumps(rows),
            "csv": "file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows),
        }
        if kind in tables:
            files[f"{folder}/metadata.{kind}"] = tables[kind]
    options = {"class_captions": "true"} if kind == "classes" else {}
    report, dataset = build(tmp_path, files, **options)
    assert report.failures == 0
    for folder, (split, count) in SPLITS.items():
        found = captions(dataset, split)
        assert all(key.startswith(f"{folder}/") for key in found)
        if kind == "classes":
            assert {k.split("/")[1] for k, v in found.items()} <= {"cat", "dog"}
            assert all(k.split("/")[1] == v for k, v in found.items())
        else:
            assert found == {f"{folder}/{i}": f"{folder} {i}" for i in range(count)}
    _, dataset = build(tmp_path, {}, overwrite=True, split="val", **options)
    assert len(captions(dataset, "val")) == 6


def test_class_folders_without_splits(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{c}/{i}.jpg": picture(i) for i, c in enumerate("abab")}
    for options in ({}, {"class_captions": "false"}):
        with pytest.raises(UsageError, match=r"no sample has a caption; .* folders a, b") as error:
            build(tmp_path, files, **options)
        assert "-o class_captions=true" in error.value.do
    report, dataset = build(tmp_path, files, class_captions="true")
    assert captions(dataset) == {"a/0": "a", "a/2": "a", "b/1": "b", "b/3": "b"}
    assert report.notes == (
        "captions are the names of the folders (a, b), as class_captions=true says",
    )


@pytest.mark.parametrize("column", ["label", "text"])
def test_numbers_of_classes_are_captions_only_if_the_user_says_so(
    tmp_path: Path, column: str
) -> None:
    files: dict[str, bytes | str] = {f"{i}.jpg": picture(i) for i in range(3)}
    files["metadata.csv"] = f"file_name,{column}\n0.jpg,0\n1.jpg,1\n2.jpg,0\n"
    with pytest.raises(UsageError, match=r"are numbers alone \(0, 1\)") as error:
        build(tmp_path, files)
    assert f"-o caption_column={column}" in error.value.do
    _, dataset = build(tmp_path, {}, caption_column=column)
    assert captions(dataset) == {"0": "0", "1": "1", "2": "0"}
    files["metadata.csv"] = f"file_name,{column}\n0.jpg,0\n1.jpg,1\n2.jpg,a dog\n"
    _, dataset = build(tmp_path, files, overwrite=True)
    assert captions(dataset)["2"] == "a dog"


def test_classes_are_asked_for_where_there_are_none(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"a/0.jpg": picture(0), "b/c/1.jpg": picture(1)}
    with pytest.raises(UsageError, match=r"b/c/1 lies in no class folder"):
        build(tmp_path, files, class_captions="true")
    with pytest.raises(TooManyFailuresError, match="no caption"):
        build(tmp_path, {})
    texts: dict[str, bytes | str] = {"a/0.txt": "x", "b/c/1.txt": "y"}
    report, dataset = build(tmp_path, texts, class_captions="true")
    assert captions(dataset) == {"a/0": "x", "b/c/1": "y"} and report.notes == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.parquet", "shards build parquet"),
        ("x.arrow", "shards build parquet"),
        ("x.tar", "shards index"),
        ("x.tar.gz", "gunzip"),
        ("x.zip", "unpack"),
    ],
)
def test_a_folder_of_something_else_says_what_to_do(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=rf"there are 1 x \.(.|\n)*{words}"):
        build(tmp_path, {name: b"x"})


def test_json_that_belongs_to_no_medium_is_counted(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {**PAIR, "0_stats.json": "{}", "info.json": '{"rows": [1]}'}
    report, dataset = build(tmp_path, {**files, "b.json": '{"caption": "lost"}'}, max_failures=0.5)
    assert list(captions(dataset)) == ["a"]
    assert "ignored: 2 x .json without a caption" in report.notes
    assert [q.reason.split(":")[0] for q in report.quarantined] == ["caption without media"]


def test_what_a_table_does_not_name_is_counted(tmp_path: Path) -> None:
    files = {
        **PAIR,
        "b.jpg": picture(1),
        "t.csv": "file,caption\na.jpg,x\n",
        "u.csv": "a\n",
        ".x": "",
    }
    report, _ = build(tmp_path, files)
    assert report.notes == (
        "not named by t.csv: 1 x .txt, 1 x .jpg, 1 x .csv",
        "hidden files and folders skipped: 1",
    )


def test_keys_that_a_program_stored_as_numbers_get_their_zeros_back(tmp_path: Path) -> None:
    rows = [{"key": k, "caption": f"picture {k}", "status": "success"} for k in range(3)]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    members = {f"{k:09d}.jpg": picture(k) for k in range(3)}
    files: dict[str, bytes | str] = {"0.tar": tar(members), "0_stats.json": "{}"}
    files["0.parquet"] = buffer.getvalue()
    _, dataset = build(tmp_path, files, "laion400m")
    assert captions(dataset) == {f"{k:09d}": f"picture {k}" for k in range(3)}
