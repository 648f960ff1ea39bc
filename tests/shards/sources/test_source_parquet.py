"""Tables with media inside: layouts of Hugging Face and img2dataset, bounded memory, bad rows."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from source_checks import build_source, decode_sample, get_reasons, make_tone, make_turns
from source_checks import make_photo as photo
from source_checks import read_samples as read

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.data.text_parts import read_turns
from onellm_dist.modalities import Part
from onellm_dist.shards import build_dataset
from onellm_dist.shards.sources.readers.arrow_files import list_parts, read_rows


def write(path: Path, rows: list[dict[str, Any]], schema: Any = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


def hub_schema(features: Mapping[str, Any], fields: Any) -> Any:
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(fields, metadata=meta)


MEDIUM = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def media(i: int) -> dict[str, Any]:
    return {"bytes": photo(seed=i), "path": f"{i}.jpg"}


def test_a_data_set_of_the_hub_in_splits(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("validation", 2), ("test", 1)):
        rows = [{"image": media(i), "text": f"{split} {i}", "n": i} for i in range(count)]
        write(tmp_path / f"in/data/{split}-00000-of-00001.parquet", rows, row_group_size=2)
    (tmp_path / "in/README.md").write_text("x")
    _, dataset = build_source("parquet", tmp_path / "in", tmp_path / "out")
    assert dataset.modalities == ("image",)
    for name, count in (("train", 5), ("validation", 2), ("test", 1)):
        split = "val" if name == "validation" else name
        found = read(dataset, split)
        assert [s["txt"] for s in found.values()] == [f"{name} {i}" for i in range(count)]
        assert next(iter(found)) == f"data/{name}-00000-of-00001/000000000"
        assert all(s["jpg"] == photo(seed=i) for i, s in enumerate(found.values()))
        assert next(iter(found.values()))["json"] == {"n": 0}


def test_a_table_of_preferences_is_still_one_of_conversations(tmp_path: Path) -> None:
    """Columns of ultrafeedback_binarized, whose `messages` are the chosen conversation."""
    asked = {"role": "user", "content": "why"}
    good, bad = ({"role": "assistant", "content": text} for text in ("because", "so"))
    row: dict[str, Any] = {"prompt": "why", "chosen": [asked, good], "rejected": [asked, bad]}
    row |= {"messages": [asked, good], "score_chosen": 8.0, "score_rejected": 3.0}
    write(tmp_path / "in/train.parquet", [row] * 3)
    report, dataset = build_source("parquet", tmp_path / "in", tmp_path / "out", modality="text")
    assert not report.quarantined and dataset.samples("train") == 3
    for sample in read(dataset).values():
        turns = read_turns({"json": Part("json", json.dumps(sample["json"]).encode())})
        assert [turn.text for turn in turns] == ["why", "because"]


@pytest.mark.parametrize("format_", ["stream", "file"])
def test_a_saved_dataset_that_was_saved_to_disk(tmp_path: Path, format_: str) -> None:
    table = pa.Table.from_pylist([{"image": media(i), "label": i % 2} for i in range(4)])
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    folder = tmp_path / "in/train"
    folder.mkdir(parents=True)
    (tmp_path / "in/dataset_dict.json").write_text('{"splits": ["train"]}')
    for name in ("data-00000-of-00001.arrow", "cache-1234.arrow"):
        new = pa.ipc.new_stream if format_ == "stream" else pa.ipc.new_file
        with new(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    state: dict[str, Any] = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    report, dataset = build_source("parquet", tmp_path / "in", tmp_path / "out", workers=2)
    assert [s["txt"] for s in read(dataset).values()] == ["cat", "dog", "cat", "dog"]
    assert report.notes == ("cache files of datasets left out: 1",)
    state["_indices_data_files"] = [{"filename": "cache-1234.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "data-00000-of-00001.arrow").touch()
    with pytest.raises(UsageError, match=r"indices mapping(.|\n)*flatten_indices"):
        build_dataset("parquet", tmp_path / "in", tmp_path / "again")


TALK = make_turns("<image>\nWhat?", "A disc.")
LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "img2dataset": ("parquet", {"jpg": photo(), "caption": "x", "key": "0"}, {"txt": "x"}),
    "bytes": ("parquet", {"image": photo(), "caption": "x"}, {"txt": "x"}),
    "list of one": ("parquet", {"images": [media(0)], "caption": "x"}, {"txt": "x"}),
    "captions": ("parquet", {"image": media(0), "caption": ["x", "y"]}, {"caption": ["x", "y"]}),
    "llava": (
        "llava-onevision",
        {"id": "7", "image": media(0), "conversations": TALK, "data_source": "s"},
        {"conversations": make_turns("What?", "A disc."), "data_source": "s"},
    ),
    "messages": (
        "parquet",
        {
            "image": media(0),
            "messages": [
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "A disc."},
            ],
        },
        {"conversations": make_turns("What?", "A disc.")},
    ),
    "finevision": (
        "finevision",
        {
            "images": [media(0)],
            "texts": [
                {"user": "What?", "assistant": "A disc."},
                {"user": "Red?", "assistant": "No."},
            ],
            "source": "s",
        },
        {"conversations": make_turns("What?", "A disc.", "Red?", "No."), "source": "s"},
    ),
    "question": (
        "parquet",
        {"image": media(0), "question": "What?", "answers": ["A disc.", "It"]},
        {"conversations": make_turns("What?", "A disc.")},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    source, row, expected = LAYOUTS[layout]
    path = write(tmp_path / "t.parquet", [row])
    _, dataset = build_source(source, path, tmp_path / "out")
    sample = read(dataset)["t/000000000"]
    assert sample["jpg"] == photo()
    assert {k: v for k, v in {**sample, **sample.get("json", {})}.items() if k in expected} == (
        expected
    )


@pytest.mark.parametrize(
    ("kind", "data", "modality", "extension"),
    [
        ("audio", make_tone("FLAC"), "audio", "flac"),
        ("audio", make_tone("WAV"), "audio", "wav"),
        ("image", photo(kind="PNG"), "image", "png"),
        ("image", photo(kind="WEBP"), "image", "webp"),
    ],
)
def test_the_content_decides_the_extension(
    tmp_path: Path, kind: str, data: bytes, modality: str, extension: str
) -> None:
    rows = [{kind: {"bytes": data, "path": "x.bin"}, "text": "x"}]
    _, dataset = build_source("parquet", write(tmp_path / "t.parquet", rows), tmp_path / "out")
    assert dataset.modalities == (modality,)
    assert read(dataset)["t/000000000"][extension] == data


def test_arrays_and_maps(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(6, 400)).astype(np.float32)
    rows = [{"imu": array.tolist(), "text": "x"}]
    _, dataset = build_source("parquet", write(tmp_path / "imu.parquet", rows), tmp_path / "imu")
    stored = np.load(io.BytesIO(read(dataset)["imu/000000000"]["imu.npy"]))
    assert np.array_equal(stored, array)
    pair = [{"image": photo(), "depth": photo(kind="PNG"), "text": "x"}]
    _, dataset = build_source("parquet", write(tmp_path / "d.parquet", pair), tmp_path / "d")
    assert dataset.modalities == ("depth",)
    assert set(read(dataset)["d/000000000"]) == {"jpg", "depth.png", "txt"}
    assert decode_sample(dataset, "d/000000000")["depth"] is not None


def test_named_files_stay_below_the_input(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jpg").write_bytes(photo())
    (tmp_path / "1.jpg").write_bytes(photo(seed=1))
    names = ["0.jpg", "../1.jpg", str(tmp_path / "1.jpg"), "2.jpg", "http://x/0.jpg"]
    rows: list[dict[str, Any]] = [{"image": {"bytes": None, "path": n}, "text": "x"} for n in names]
    write(tmp_path / "in/t.parquet", rows, pa.schema([("image", MEDIUM), ("text", pa.string())]))
    report, dataset = build_source("parquet", tmp_path / "in", tmp_path / "out", max_failures=1)
    assert list(read(dataset)) == ["t/000000000"]
    assert [r.split(":")[0] for r in get_reasons(report).values()] == [
        "outside of the input",
        "outside of the input",
        "missing file",
        "remote file",
    ]


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    path = write(tmp_path / "hub/blobs/abc", [{"image": media(0), "text": "x"}])
    snapshot = tmp_path / "hub/snapshots/1/data"
    snapshot.mkdir(parents=True)
    (snapshot / "train-00000-of-00001.parquet").symlink_to(path)
    report, _ = build_source("parquet", tmp_path / "hub/snapshots/1", tmp_path / "out")
    assert report.samples == 1


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    schema = pa.schema([("images", pa.list_(MEDIUM)), ("text", pa.string())])
    rows: list[dict[str, Any]] = [
        {"images": [media(0)], "text": "good"},
        {"images": [media(0), media(1)], "text": "two"},
        {"images": [], "text": "none"},
        {"images": None, "text": "null"},
        {"images": [{"bytes": b"what", "path": None}], "text": "what"},
        {"images": [media(2)], "text": None},
    ]
    path = write(tmp_path / "t.parquet", rows, schema)
    report, dataset = build_source("parquet", path, tmp_path / "out", max_failures=1)
    assert [s["txt"] for s in read(dataset).values()] == ["good"]
    assert [r.split(":")[0] for r in get_reasons(report).values()] == [
        "several media",
        "missing file",
        "missing file",
        "unknown kind of file",
        "no caption",
    ]
    report, _ = build_source(
        "parquet", path, tmp_path / "some", missing="skip", several="skip", max_failures=1
    )
    assert report.failures == 2
    report, dataset = build_source("parquet", path, tmp_path / "text", modality="text")
    assert [s["txt"] for s in read(dataset).values()] == ["none", "null"]
    assert any("has a medium" in note for note in report.notes)


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"url": "http://x/0.jpg", "caption": "x"}, {}, "do not determine the modality"),
        ({"a": 1, "caption": "x"}, {"modality": "image"}, "no column holds the part 'image'"),
        ({"image": photo()}, {}, "no column of captions or conversations"),
        ({"image": photo(), "audio": b"x", "text": "x"}, {}, "audio or image"),
        ({"image": photo(), "text": "x"}, {"caption_column": "no"}, "has no column 'no'"),
        ({"image": photo(), "text": "x"}, {"several": "first"}, "none of fail, skip, list"),
    ],
)
def test_tables_that_are_refused(
    tmp_path: Path, row: dict[str, Any], options: dict[str, str], words: str
) -> None:
    path = write(tmp_path / "t.parquet", [row])
    with pytest.raises(UsageError, match=words):
        build_dataset("parquet", path, tmp_path / "out", options=options)


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", [{"image": photo(), "text": "x"}]).read_bytes()
    for name, data in (("a.parquet", b"x"), ("b.parquet", good[:-9]), ("c.arrow", b"ARROW1??")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(OneLLMError, match="cannot be read"):
            build_dataset("parquet", tmp_path / name, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.parquet or \.arrow"):
        build_dataset("parquet", tmp_path / "empty", tmp_path / "out")


_MEASURE = """
import resource, sys
from pathlib import Path
from onellm_dist.shards.sources.readers.arrow_files import list_parts, read_rows
limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = 0
try:
    for part in list_parts(Path(sys.argv[1])):
        for row in read_rows(Path(sys.argv[1]), [part]):
            count += 1
            if count == 300:
                break
except Exception as error:
    print(type(error).__name__, error)
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit) // 1024)
"""


@pytest.mark.slow
def test_a_small_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    """One value of 4 MB in 3000 rows is 12 GB as a table, and some kilobytes as parquet."""
    value = pa.array([b"\xff\xd8\xff" + bytes(4 << 20)])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, np.int32)), value)
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": column}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    *said, line = done.stdout.splitlines()
    count, megabytes = map(int, line.split())
    assert (count == 300 or "UsageError" in said[0]) and megabytes < 600, done.stdout


def test_a_footer_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pa.nulls(40_000_000, pa.bool_())}), path)
    with pytest.raises(UsageError, match="rows"):
        list_parts(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20


def test_parts_are_read_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [{"n": i} for i in range(10)], row_group_size=3)
    parts = list_parts(path)
    assert [p.rows for p in parts] == [3, 3, 3, 1]
    assert [r.values["n"] for p in parts[1:3] for r in read_rows(path, [p])] == list(range(3, 9))
