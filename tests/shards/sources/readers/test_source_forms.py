"""Tables and lists in the forms that people have: what is read, and what is refused in words."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from shard_worlds import contents, picture, split_arguments, write_tree
from source_checks import make_photo, make_turns

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.data.text_parts import read_turns
from onellm_dist.modalities import Part
from onellm_dist.shards import build_dataset
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.index import count_text_bytes
from onellm_dist.shards.sources.base import BuildReport
from onellm_dist.shards.sources.readers.conversations import CAPTION_PROMPTS
from onellm_dist.shards.sources.readers.json_stream import read_rows, scan_rows, split_rows
from onellm_dist.shards.sources.readers.table_rows import read_rows as read_table

MEDIA = {f"{i}.jpg": picture(i) for i in range(3)}


def build(
    tmp_path: Path, files: Mapping[str, bytes | str], source: str = "folder", **options: Any
) -> tuple[BuildReport, Dataset]:
    report = build_dataset(
        source, write_tree(tmp_path / "in", files), tmp_path / "out", **split_arguments(options)
    )
    return report, open_dataset(tmp_path / "out")


def captions(dataset: Dataset) -> list[str]:
    return [parts["txt"].decode() for parts in contents(dataset).values()]


def meta(dataset: Dataset) -> list[dict[str, Any]]:
    return [json.loads(parts["json"]) for parts in contents(dataset).values()]


OBJECTS = [{"file": f"{i}.jpg", "caption": f"c{i}"} for i in range(3)]
LINES = "\n".join(map(json.dumps, OBJECTS))
TABLES: dict[str, tuple[str, bytes | str]] = {
    "json lines": ("t.jsonl", LINES),
    "json lines in .json": ("t.json", LINES + "\n"),
    "json lines with a BOM": ("t.json", "\ufeff" + LINES),
    "ndjson": ("t.ndjson", LINES.replace("\n", "\r\n\r\n")),
    "list": ("t.json", json.dumps(OBJECTS)),
    "list in .jsonl": ("t.jsonl", json.dumps(OBJECTS, indent=1)),
    "list on one line in .jsonl": ("t.jsonl", json.dumps(OBJECTS)),
    "csv": ("t.csv", "file,caption\n" + "".join(f"{i}.jpg,c{i}\n" for i in range(3))),
    "windows": ("t.csv", "\ufefffile;caption\r\n" + "".join(f"{i}.jpg;c{i}\r\n" for i in range(3))),
    "commas in the header": (
        "t.csv",
        "file;caption;a, b\n" + "".join(f"{i}.jpg;c{i};1\n" for i in range(3)),
    ),
    "pipes": ("t.csv", "file|caption\n" + "".join(f"{i}.jpg|c{i}\n" for i in range(3))),
    "tabs": ("t.csv", "file\tcaption\n" + "".join(f'{i}.jpg\t"c{i}"\n' for i in range(3))),
    "sep": ("t.csv", "sep=;\r\nfile;caption\r\n" + "".join(f"{i}.jpg;c{i}\r\n" for i in range(3))),
    "quotes": ("t.csv", '"file","caption"\n' + "".join(f'"{i}.jpg","c{i}"\n' for i in range(3))),
    "backslashes": ("t.csv", "file,caption\n" + "".join(f".\\{i}.jpg,c{i}\n" for i in range(3))),
    "no end of line": ("t.csv", "file,caption\n0.jpg,c0\n1.jpg,c1\n2.jpg,c2"),
}


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.seconds
def test_forms_of_tables(tmp_path: Path, form: str) -> None:
    name, content = TABLES[form]
    report, dataset = build(tmp_path, {**MEDIA, name: content})
    assert (captions(dataset), report.failures, report.notes) == (["c0", "c1", "c2"], 0, ())


NO_TABLES: dict[str, tuple[bytes | str, str]] = {
    "utf-16": ("file,caption\n0.jpg,x\n".encode("utf-16"), "UTF-16(.|\n)*iconv"),
    "utf-16 without mark": ("file,caption\n0.jpg,x\n".encode("utf-16-le"), "UTF-16"),
    "gzip": (gzip.compress(b"file,caption\n0.jpg,x\n"), "gzip(.|\n)*gunzip"),
    "xlsx": (b"PK\x03\x04rest", "xlsx(.|\n)*CSV"),
    "xls": (b"\xd0\xcf\x11\xe0rest", "Excel"),
    "parquet": (b"PAR1rest", "source parquet"),
    "two captions": ("file,caption,Caption\n0.jpg,x,y\n", "several columns are called 'caption'"),
    "open header": ('file,"caption\n0.jpg,x\n', "header cannot be read"),
}


@pytest.mark.parametrize("kind", NO_TABLES)
def test_what_is_no_table_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    content, words = NO_TABLES[kind]
    with pytest.raises(UsageError, match=words):
        build(tmp_path, {**MEDIA, "t.csv": content}, captions="t.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"a": 1}] [{"a": 2}]', "several JSON values"),
        ('[{"a": 1}]\n{"a": 2}', "several JSON values"),
        ('{\n"a": {}\n}\n{\n"b": {}\n}', "several JSON values"),
        ('[{"a": 1}] trailing', "several JSON values"),
        ("[" * 100_000, "nested too deeply"),
        (f"[{'1' * 5000}]", "at byte"),
    ],
)
def test_what_follows_a_json_document_is_noticed(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(OneLLMError, match=words):
        list(scan_rows(tmp_path / "t.json"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"rows": [1], "rows": [2]}', "the key 'rows' stands there again"),
        ('{"rows": [1]} {"rows": [2]}', "several JSON values"),
        ('{"rows": [1], "more": [', "Expecting value"),
        ('{"rows": [1]', "it ends there"),
    ],
)
def test_what_follows_rows_under_a_key_is_noticed(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(OneLLMError, match=words):
        list(scan_rows(tmp_path / "t.json", "rows"))


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_a_broken_line_is_one_bad_row(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"a": 1}\n{broken\n\n{"a": 3}\n')
    (split,) = split_rows(tmp_path, name, 10)
    assert [item.value for item in read_rows(tmp_path, split.description)] == [
        {"a": 1},
        None,
        {"a": 3},
    ]


def test_a_single_object_on_a_line_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"id": 1, "conversations": []}')
    assert [(row.key, row.value) for row in scan_rows(tmp_path / "t.json")] == [
        ("", {"id": 1, "conversations": []})
    ]
    (tmp_path / "e.json").write_text('{"1": {"a": 1}, "2": {"a": 2}}')
    assert [row.key for row in scan_rows(tmp_path / "e.json")] == ["1", "2"]


def test_one_open_quote_costs_its_own_row(tmp_path: Path) -> None:
    rows = "".join(f"{i}.jpg,c{i}\n" for i in range(100))
    (tmp_path / "t.csv").write_text(f'file,caption\na.jpg,"open\n{rows}')
    found = list(read_table(tmp_path / "t.csv"))
    assert len(found) == 101
    assert [row.problem is None for row in found] == [False, *[True] * 100]


@pytest.mark.parametrize("cell", ["NaN", "nan", "NULL", "None", "<NA>", "N/A"])
def test_a_cell_without_a_value_is_no_caption(tmp_path: Path, cell: str) -> None:
    table = f"file,caption\n0.jpg,x\n1.jpg,{cell}\n2.jpg,none of it\n"
    report, dataset = build(tmp_path, {**MEDIA, "t.csv": table}, max_failures=0.5)
    assert captions(dataset) == ["x", "none of it"]
    assert report.quarantined[0].reason.startswith(f"no caption: the cell is {cell}")


def test_no_number_that_is_no_json_is_stored(tmp_path: Path) -> None:
    lines = '{"file": "0.jpg", "caption": "x", "score": NaN, "n": 1}\n'
    _, dataset = build(tmp_path, {**MEDIA, "t.jsonl": lines})
    assert meta(dataset) == [{"n": 1}]


def test_missing_files_are_named_with_where_they_were_looked_for(tmp_path: Path) -> None:
    table = "file,caption\nimg/0.jpg,x\nimg/1.jpg,y\nimg/2.jpg,z\nimg/3.jpg,w\n"
    with pytest.raises(UsageError) as info:
        build(tmp_path, {**MEDIA, "t.csv": table})
    assert (
        f"missing file: img/0.jpg (looked for in {tmp_path / 'in'}; 0.jpg lies there"
        in info.value.what
    )
    assert "and 1 more" in info.value.what
    assert "-o media=FOLDER" in info.value.do
    (tmp_path / "elsewhere/img").mkdir(parents=True)
    for i in range(4):
        (tmp_path / f"elsewhere/img/{i}.jpg").write_bytes(picture(i))
    report, _ = build(tmp_path, {}, media=str(tmp_path / "elsewhere"))
    assert report.samples == 4


@pytest.mark.parametrize("value", [["0.jpg"], "0.jpg"])
def test_a_list_of_one_file_is_a_file(tmp_path: Path, value: Any) -> None:
    line = json.dumps({"image": value, "caption": "x"})
    _, dataset = build(tmp_path, {**MEDIA, "t.jsonl": line})
    assert captions(dataset) == ["x"]
    row = {"id": 1, "image": value, "conversations": make_turns("<image>\nWhat?", "A disc.")}
    files: dict[str, bytes | str] = {
        "0.jpg": make_photo(),
        "llava_v1_5_mix665k.json": json.dumps([row]),
    }
    report = build_dataset("llava665k", write_tree(tmp_path / "llava", files), tmp_path / "o")
    assert report.samples == 1


def test_a_list_of_several_files_is_refused_in_words(tmp_path: Path) -> None:
    rows = [{"image": "2.jpg", "caption": "x"}, {"image": ["0.jpg", "1.jpg"], "caption": "y"}]
    lines = "\n".join(map(json.dumps, rows))
    report, _ = build(tmp_path, {**MEDIA, "t.jsonl": lines}, max_failures=0.5)
    assert [q.reason.split(":")[0] for q in report.quarantined] == ["several media"]


ROLES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A disc."}]


@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize("turns", [ROLES, make_turns("What?", "A disc.")])
@pytest.mark.parametrize("layout", ["table", "side", "llava665k", "sharegpt", "reference-lists"])
@pytest.mark.seconds
def test_turns_of_any_form_are_taken_by_all(
    tmp_path: Path, key: str, turns: list[Any], layout: str
) -> None:
    row = {"id": 1, "image": "0.jpg", key: turns}
    cases: dict[str, tuple[str, dict[str, bytes | str], dict[str, str]]] = {
        "table": ("folder", {"t.jsonl": json.dumps(row)}, {}),
        "side": ("folder", {"0.json": json.dumps({key: turns})}, {}),
        "llava665k": ("llava665k", {"llava_v1_5_mix665k.json": json.dumps([row])}, {}),
        "sharegpt": ("sharegpt", {"t.jsonl": json.dumps({"id": 1, key: turns})}, {}),
        "reference-lists": (
            "reference-lists",
            {"t.json": json.dumps([row])},
            {"modality": "image"},
        ),
    }
    source, files, options = cases[layout]
    _, dataset = build(tmp_path, {"0.jpg": picture(0), **files}, source, **options)
    (parts,) = contents(dataset).values()
    stored = read_turns({"json": Part("json", parts["json"])})
    assert [(t.role, t.text) for t in stored] == [("user", "What?"), ("assistant", "A disc.")]
    assert count_text_bytes(None, parts["json"]) == len("What?A disc.")


def test_captions_become_conversations(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {**MEDIA, **{f"{i}.txt": f" c{i}\n" for i in range(3)}}
    files["2.json"] = json.dumps({"conversations": make_turns("Own?", "Yes.")})
    asked = ["What is this?", "Describe it."]
    report, dataset = build(tmp_path, files, question="|".join(asked))
    found = [row["conversations"] for row in meta(dataset)]
    assert report.failures == 0
    assert captions(dataset) == ["c0", "c1", "c2"]
    assert [turns[1]["value"] for turns in found] == ["c0", "c1", "Yes."]
    assert {turns[0]["value"] for turns in found[:2]} <= set(asked)
    again = build_dataset(
        "folder",
        tmp_path / "in",
        tmp_path / "again",
        options={"question": asked, "name": "out"},
    )
    assert again.samples == 3
    assert contents(open_dataset(tmp_path / "again")) == contents(dataset)


def test_every_source_makes_them_and_the_papers_prompt_is_the_default(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "0.jpg": picture(0),
        "0.json": json.dumps({"captions": ["one", "two"]}),
    }
    _, dataset = build(tmp_path, files, question="default")
    assert meta(dataset)[0]["conversations"] == make_turns(CAPTION_PROMPTS["image"], "one")
    with pytest.raises(UsageError, match="no prompt for captions of text"):
        build(tmp_path, {}, overwrite=True, question="default", modality="text")
    with pytest.raises(UsageError, match="empty question"):
        build(tmp_path, {}, overwrite=True, question="What?||")


@pytest.mark.parametrize("kind", ["..", "absolute", "link", "folder link", "text link"])
@pytest.mark.seconds
def test_nothing_leads_out_of_the_input(tmp_path: Path, kind: str) -> None:
    outside = write_tree(tmp_path / "else", {"9.jpg": picture(9), "9.txt": "secret"})
    root = write_tree(tmp_path / "in", {**MEDIA, **{f"{i}.txt": "x" for i in range(3)}})
    name = {"..": "../else/9.jpg", "absolute": str(outside / "9.jpg")}.get(kind)
    if name is not None:
        (root / "t.csv").write_text(f"file,caption\n0.jpg,x\n{name},y\n")
    elif kind == "folder link":
        (root / "sub").symlink_to(outside)
    else:
        (root / "9.jpg").symlink_to(outside / "9.jpg")
        (root / "9.txt").symlink_to(outside / "9.txt")
        if kind == "text link":
            (root / "9.jpg").unlink()
            (root / "9.jpg").write_bytes(picture(9))
    report, dataset = build(tmp_path, {}, max_failures=0.5)
    (bad,) = report.quarantined
    assert bad.reason.startswith("outside of the input: ")
    assert f"-o follow={outside}" in bad.reason
    assert "secret" not in captions(dataset)
    for follow in (str(outside), f"{tmp_path / 'in'},{outside}", "any"):
        report, _ = build(tmp_path, {}, overwrite=True, follow=follow)
        assert report.failures == 0
    with pytest.raises(UsageError, match=r"follow=/none: there is no such folder"):
        build(tmp_path, {}, overwrite=True, follow="/none")


def test_an_input_that_is_a_link_is_no_way_out(tmp_path: Path) -> None:
    write_tree(tmp_path / "real", {**MEDIA, **{f"{i}.txt": "x" for i in range(3)}})
    (tmp_path / "in").symlink_to(tmp_path / "real")
    (tmp_path / "real/inner").mkdir()
    (tmp_path / "real/inner/5.jpg").symlink_to("../0.jpg")
    (tmp_path / "real/inner/5.txt").write_text("y")
    report, _ = build(tmp_path, {})
    assert (report.samples, report.failures) == (4, 0)


def test_annotations_stay_inside_unless_media_names_the_place(tmp_path: Path) -> None:
    write_tree(tmp_path / "pool", {"x/0.jpg": make_photo()})
    row = {"id": 1, "image": "x/0.jpg", "conversations": make_turns("What?", "A disc.")}
    inputs = write_tree(tmp_path / "in", {"llava_v1_5_mix665k.json": json.dumps([row])})
    (inputs / "x").symlink_to(tmp_path / "pool/x")
    with pytest.raises(OneLLMError, match="outside of the input"):
        build_dataset("llava665k", inputs, tmp_path / "out")
    for options in ({"media": str(tmp_path / "pool")}, {"follow": str(tmp_path / "pool")}):
        report = build_dataset(
            "llava665k", inputs, tmp_path / "out", options=options, overwrite=True
        )
        assert report.samples == 1
