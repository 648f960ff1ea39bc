"""What lies in a folder and is not found: the error says where it is, or it is counted."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from shard_worlds import contents, picture, split_arguments, write_tree
from source_checks import make_film
from test_source_names import tar

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.sources.base import BuildReport
from onellm_dist.shards.tools.index_existing import index_existing_shards

ROWS = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(3)]
MEDIA: dict[str, bytes | str] = {f"img/{i}.jpg": picture(i) for i in range(3)}


def build(
    tmp_path: Path, files: Mapping[str, bytes | str], source: str = "folder", **options: Any
) -> tuple[BuildReport, Dataset]:
    report = build_dataset(
        source, write_tree(tmp_path / "in", files), tmp_path / "out", **split_arguments(options)
    )
    return report, open_dataset(tmp_path / "out")


def write_parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("IMG/{}.JPG", "img/0.jpg lies there, and upper and lower case differ"),
        ("img/{}.png", "img/0.jpg lies there, with another extension"),
        ("img/{}", "img/0.jpg lies there, with another extension"),
        ("img%2F{}.jpg", "img/0.jpg lies there, without the % of web addresses"),
        ("/data/set/img/{}.jpg", "img/0.jpg lies there, where its path begins otherwise"),
        ("C:\\set\\img\\{}.jpg", "img/0.jpg lies there, where its path begins otherwise"),
        ("../img/{}.jpg", "img/0.jpg lies there, where its path begins otherwise"),
        ("other/{}.jpg", None),
    ],
)
def test_a_file_of_nearly_the_name_is_named(tmp_path: Path, path: str, hint: str | None) -> None:
    table = "file,caption\n" + "".join(f"{path.format(i)},c\n" for i in range(3))
    with pytest.raises(UsageError, match="none of the files of its 3 rows was found") as error:
        build(tmp_path, {**MEDIA, "t.csv": table})
    assert (f"(looked for in {tmp_path / 'in'}; {hint})" if hint else "in)") in error.value.what


LOST: dict[str, tuple[dict[str, bytes | str], str, str]] = {
    "table further down": (
        {"img/t.jsonl": json.dumps({"file": "0.jpg", "caption": "x"})},
        "the table img/t.jsonl does not lie at the top",
        "-o captions=img/t.jsonl",
    ),
    "parquet": (
        {"img/metadata.parquet": write_parquet(ROWS)},
        "img/metadata.parquet is a table that this source does not read",
        "shards build parquet",
    ),
    "spreadsheet": ({"t.xlsx": b"PK"}, "t.xlsx is a spreadsheet", "CSV"),
    "JSON with a comment": (
        {"rows.json": '// by hand\n[{"file": "img/0.jpg", "caption": "x"}]', "README.txt": "x"},
        "rows.json cannot be read as a table (rows.json: at byte 0: '/'",
        "",
    ),
    "JSON with single quotes": (
        {"rows.json": "[{'file': 'img/0.jpg', 'caption': 'x'}]"},
        "rows.json cannot be read as a table (",
        "",
    ),
    "no header": (
        {"t.csv": "img/0.jpg,a cat\nimg/1.jpg,a dog\n"},
        "the first line of t.csv holds a file, img/0.jpg",
        "file,caption",
    ),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_table_that_is_not_read_is_named(tmp_path: Path, kind: str) -> None:
    files, what, do = LOST[kind]
    with pytest.raises(UsageError, match="no sample has a caption, and ") as error:
        build(tmp_path, {**MEDIA, **files})
    assert what in error.value.what and do in error.value.do
    texts: dict[str, bytes | str] = {f"img/{i}.txt": "x" for i in range(3)}
    _, dataset = build(tmp_path, texts, modality="image", max_failures=0.5)
    assert len(contents(dataset)) == 3


@pytest.mark.parametrize("kind", ["jsonl", "file_names", "side"])
def test_folders_of_splits_below_data(tmp_path: Path, kind: str) -> None:
    files: dict[str, bytes | str] = {"README.md": "x", "LICENSE.txt": "x"}
    for folder in ("train", "test"):
        files |= {f"data/{folder}/{i}.png": picture(i, "PNG") for i in range(3)}
        if kind == "side":
            files |= {f"data/{folder}/{i}.txt": f"picture {i}" for i in range(3)}
            continue
        rows: list[dict[str, Any]] = [dict(row) for row in ROWS]
        if kind == "file_names":
            rows = [{"file_names": [row["file_name"]], "text": row["text"]} for row in ROWS]
        files[f"data/{folder}/metadata.jsonl"] = "\n".join(map(json.dumps, rows))
    report, dataset = build(tmp_path, files)
    assert (report.failures, set(dataset.splits)) == (0, {"train", "test"})
    for split in dataset.splits:
        texts = sorted(parts["txt"].decode() for parts in contents(dataset, split).values())
        assert texts == [f"picture {i}" for i in range(3)]
    (tmp_path / "in" / "more.png").write_bytes(picture(9, "PNG"))
    (tmp_path / "in" / "more.txt").write_text("x")
    if kind == "side":
        _, dataset = build(tmp_path, {}, overwrite=True, max_failures=0.2)
        assert dataset.splits == ("train",)


def test_parquet_reads_the_files_that_a_metadata_parquet_names(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        f"train/{row['file_name']}": picture(i, "PNG") for i, row in enumerate(ROWS)
    }
    files["train/metadata.parquet"] = write_parquet(ROWS)
    report, _ = build(tmp_path, files, "parquet", modality="image")
    assert (report.samples, report.failures) == (3, 0)


def test_what_a_download_lacks_or_holds_beside_is_named(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "0.tar": tar({"0.jpg": picture(0), "0.txt": b"x"}),
        "0_stats.json": "{}",
        "1.parquet": b"x",
        "1_stats.json": "{}",
        "2.TAR": b"x",
    }
    report, _ = build(tmp_path, files, "laion400m")
    assert report.samples == 1
    assert "parquets without their tar, whose samples are missing: 1.parquet" in report.notes
    assert "not read, because only .tar is: 2.TAR" in report.notes


def test_a_compressed_tar_without_its_suffix_is_called_so(tmp_path: Path) -> None:
    members = {"1.jpg": picture(1), "1.txt": b"x"}
    good = tar({"0.jpg": picture(0), "0.txt": b"x"})
    files: dict[str, bytes | str] = {"0.tar": good, "1.tar": tar(members, "w:gz")}
    report, _ = build(tmp_path, files, "laion400m", unfinished="take", max_failures=0.6)
    assert report.quarantined[0].reason == "compressed tar: 1.tar is compressed (gzip); unpack it"


@pytest.mark.parametrize(("stored", "listed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_webvids_folders_may_have_the_other_unicode_form(
    tmp_path: Path, stored: Any, listed: Any
) -> None:
    folder, page = (unicodedata.normalize(form, "é") for form in (stored, listed))
    files: dict[str, bytes | str] = {
        f"videos/{folder}/1.mp4": make_film(),
        "r.csv": f"videoid,page_dir,name\n1,{page},a clip\n",
    }
    report, _ = build(tmp_path, files, "webvid")
    assert (report.samples, report.failures) == (1, 0)


def test_a_tar_whose_names_have_other_dots_is_explained(tmp_path: Path) -> None:
    for name in ("22.05", "Track 2.0 (Clean)"):
        data = tar({f"{name}.jpg": picture(0), f"{name}.txt": b"x"})
        folder = write_tree(tmp_path / name, {"0.tar": data})
        with pytest.raises(UsageError, match="no file there is media") as error:
            index_existing_shards(folder)
        assert "the extension begins at the first dot of a name" in error.value.do


@pytest.mark.parametrize("text", ["\u200b\u200b", "\u00a0", "\u200d \ufeff", "\x00\x01", "\u2028"])
def test_a_caption_that_shows_nothing_is_empty(tmp_path: Path, text: str) -> None:
    files: dict[str, bytes | str] = {"a.jpg": picture(0), "a.txt": text}
    files |= {"b.jpg": picture(1), "b.txt": f"{text}x"}
    report, dataset = build(tmp_path, files, max_failures=0.5)
    assert [q.reason for q in report.quarantined] == ["empty caption: a.txt"]
    assert len(contents(dataset)) == 1
