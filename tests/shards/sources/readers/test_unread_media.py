"""Null beside media: no medium of a row is lost without a word, in rows and tables of any kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from listed_rows import build, picture, read_all, talk, write_parquet, write_rows
from source_checks import read_samples

A, B = "pics/0.jpg", "pics/1.jpg"
ASKED = {"type": "text", "text": "What?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in/pics").mkdir(parents=True)
    for number in range(2):
        (tmp_path / f"in/pics/{number}.jpg").write_bytes(picture(number))
    return tmp_path / "in"


def ask(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": talk([*parts, ASKED], openai=True)}


TALK = {"conversations": talk("What?")}
ROWS: dict[str, tuple[dict[str, Any], str, list[str] | str]] = {
    # the row; what a dataset of text says of it; its media or what one of pictures says
    "null": ({**TALK, "image": None, "images": [None]}, "", []),
    "null object": ({**TALK, "image": {"bytes": None, "path": None}}, "", []),
    "a word": (
        {**TALK, "depth": "deep", "image_2": "", "image_size": 4, "image_3": "None"},
        "",
        [],
    ),
    "null, then one": ({**TALK, "images": [None, A]}, "the row has image", ["image"]),
    "another column": ({**TALK, "image": None, "image_1": A}, "image_1 holds", "image_1 holds"),
    "other columns": ({**TALK, "image": A, "Image 2": {"path": B}}, "has image", "Image 2 holds"),
    "a path": ({**TALK, "image": None, "image_path": A}, "image_path holds", "image_path holds"),
    "where it is from": ({**TALK, "image": A, "image_path": "x/y"}, "has image", ["image"]),
    "a part": (ask({"type": "image", "image": None, "path": A}), "has image", ["image"]),
    "a part's place": (ask({"type": "image"}), "has image", "1 <image> for 0 media"),
    "null content": (
        {"messages": [{**turn, "value": None} for turn in ask({"type": "image"})["messages"]]},
        "has image",
        "1 <image> for 0 media",
    ),
    "null speaker": (
        {
            "conversations": [
                {"from": "human", "content": None, "value": [{"type": "image", "image": A}, ASKED]},
                talk("")[1],
            ]
        },
        "has image",
        ["image"],
    ),
}


@pytest.mark.parametrize("is_text", [True, False])
def test_rows(folder: Path, is_text: bool) -> None:
    write_rows(folder, [row for row, _, _ in ROWS.values()])
    source, options = ("sharegpt", {}) if is_text else ("interleaved", {"modality": "image"})
    dataset, report = build(source, folder, **options)
    said = {q.key: q.reason for q in report.quarantined}
    samples = read_samples(dataset)
    for number, (name, (_, text, pictures)) in enumerate(ROWS.items()):
        expected = text if is_text else pictures
        if isinstance(expected, str) and expected:
            assert expected in said[f"rows_json-{number}"], name
        else:
            found = samples[f"rows-{number:07d}"]["json"]
            assert is_text or found["media"] == expected, name
    good = [r for r in ROWS.values() if not (r[1] if is_text else isinstance(r[2], str))]
    assert dataset.samples() == len(good)


def test_preferences_of_text_have_no_media_in_answers_either(folder: Path) -> None:
    pair = {"prompt": "Why?", "chosen": "because", "rejected": "so"}
    shown = [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "so"}]}]
    medium = {"bytes": picture(), "path": "0.jpg"}
    (folder.parent / "table").mkdir()
    write_parquet(
        folder.parent / "table/t.parquet",
        [
            {**pair, "image": None, "image_1": None},
            {**pair, "image": None, "image_1": medium},
            {**pair, "image": {"bytes": None, "path": None}, "image_1": None},
        ],
    )
    write_rows(folder, [pair, {**pair, "rejected": shown}])
    for inputs, words in (
        (folder, "the row has image"),
        (folder.parent / "table", "image_1 holds"),
    ):
        dataset, report = build("preferences", inputs)
        assert [words in q.reason for q in report.quarantined] == [True]
        assert dataset.samples() == (1 if inputs == folder else 2)
        (folder.parent / "preferences-out").rename(folder.parent / f"{inputs.name}-done")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        return write_parquet(path, rows)
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    return None


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables_with_media_inside(tmp_path: Path, suffix: str) -> None:
    medium = {"bytes": picture(), "path": "0.jpg"}
    empty: dict[str, Any] = {"bytes": None, "path": None}
    base = {"images": None, "image_1": None, "image_path": None, "text": "x"}
    rows: list[dict[str, Any]] = [
        base,
        {**base, "images": [empty, medium]},
        {**base, "images": [empty], "image_1": empty},
        {**base, "images": [], "image_1": medium},
        {**base, "images": [medium], "image_1": medium},
        {**base, "image_path": "a.jpg"},
    ]
    (tmp_path / "in").mkdir()
    write_table(tmp_path / f"in/t{suffix}", rows)
    good: dict[str, list[int]] = {}
    said: dict[str, list[str]] = {}
    for kind, options in {
        "text": {"modality": "text"},
        "one": {"modality": "image"},
        "skip": {"modality": "image", "missing": "skip"},
        "list": {"modality": "image", "several": "list"},
    }.items():
        dataset, report = build("parquet", tmp_path / "in", **options)
        good[kind] = [int(key.rpartition("/")[2]) for key in read_samples(dataset)]
        said[kind] = [*report.notes, *(q.reason for q in report.quarantined)]
        if kind == "list":
            assert [m["media"] for _, m in read_all(dataset).values()] == [[], ["image"], []]
        (tmp_path / "parquet-out").rename(tmp_path / f"{kind}-out")
    assert good == {"text": [0, 2], "one": [1], "skip": [1], "list": [0, 1, 2]}
    for kind, words in {
        "text": ("has a medium (the column images)", "(the column image_1)", "image_path)"),
        "one": ("the row has no medium, but for the column image_1", "the column image_path"),
        "skip": ("the column image_1, which is not read", "image_path, which is not read"),
        "list": ("the column image_1 holds a medium", "the column image_path holds a medium"),
    }.items():
        for word in words:
            assert any(word in line for line in said[kind]), (kind, word, said[kind])


def test_content_parts_of_tables(tmp_path: Path) -> None:
    """The parquet source reads media from columns alone."""
    medium = {"bytes": picture(), "path": "0.jpg"}
    part = {"type": "image", "image": medium}
    said = {"type": "text", "text": "What?", "image": None}
    answer = {"role": "assistant", "content": [{**said, "text": "yes"}]}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [part, said]}, answer], "image": medium},
        {"messages": [{"role": "user", "content": [said]}, answer], "image": None},
    ]
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in/t.parquet", rows)
    dataset, report = build("parquet", tmp_path / "in", modality="text")
    assert dataset.samples() == 1 and "has a medium" in report.notes[0]
    (tmp_path / "parquet-out").rename(tmp_path / "text-out")
    dataset, report = build("parquet", tmp_path / "in", modality="image", several="list")
    assert dataset.samples() == 1
    assert [q.reason for q in report.quarantined] == [
        "unread media: a content part of type image holds a medium, and is not read"
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_tables_of_folders(folder: Path, suffix: str) -> None:
    names = ("image", "image_2", "text")
    rows = [(A, None, "both"), (None, B, "other"), (None, None, "none"), (A, B, "two")]
    path = folder / f"t{suffix}"
    if suffix == ".csv":
        lines = [",".join(names), *(",".join(v or "" for v in row) for row in rows)]
    else:
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    texts, said = {}, {}
    for kind, options in {
        "image": {"modality": "image"},
        "list": {"modality": "image", "several": "list"},
        "text": {"modality": "text"},
    }.items():
        dataset, report = build("folder", folder, captions=path.name, **options)
        texts[kind] = [s["txt"] for s in read_samples(dataset).values()]
        said[kind] = [*report.notes, *(q.reason for q in report.quarantined)]
        (folder.parent / "folder-out").rename(folder.parent / f"{kind}-out")
    assert texts == {"image": ["both"], "list": ["both", "none"], "text": ["none"]}
    for kind, words in {
        "image": "the column image_2 names a file",
        "list": "the column image_2 names a file",
        "text": "has a medium",
    }.items():
        assert any(words in line for line in said[kind]), (kind, said[kind])
