"""Rows of JSON files by byte range: arrays, entries and lines of any size, read in small pieces."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.sources.readers import json_scanner
from onellm_dist.shards.sources.readers.json_stream import (
    has_key,
    read_rows,
    read_rows_at,
    scan_rows,
    split_rows,
)


def odd_values(seed: int, count: int) -> list[Any]:
    """Everything that JSON can say, with texts that look like its structure."""
    draw = random.Random(seed)
    texts = ["", 'a "quoted" [text], {x: 1}', "é 東京 🎈", "\\ \n \t \u2028", "]", "},{"]
    pick: list[Any] = [None, True, -1.5e-7, 12345678901234567890, *texts]
    return [
        draw.choice(
            [
                draw.choice(pick),
                {"k": draw.choice(texts), "n": [draw.random(), {}]},
                [],
                {"d": {"e": [1, [2]]}},
            ]
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("style", ["compact", "indented", "escaped"])
def test_what_is_read_is_what_json_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, style: str
) -> None:
    monkeypatch.setattr(json_scanner, "_CHUNK", chunk)
    values = odd_values(chunk, 60)
    whole = {
        "info": {"rows": [1, {"a": 2}]},
        "n": 17,
        "rows": values,
        "more": {f"key {i}é": v for i, v in enumerate(values)},
        "end": [],
    }
    layouts: dict[str, dict[str, Any]] = {
        "compact": {"separators": (",", ":"), "ensure_ascii": False},
        "indented": {"indent": 2},
        "escaped": {},
    }
    text = json.dumps(whole, **layouts[style])
    (tmp_path / "x.json").write_bytes(
        b"\xef\xbb\xbf" + text.encode() if style == "indented" else text.encode()
    )
    groups = list(split_rows(tmp_path, "x.json", 7, key="rows"))
    assert [g.count for g in groups] == [7] * 8 + [4]
    assert [i.value for g in groups for i in read_rows(tmp_path, g.description)] == values
    assert [i.number for i in read_rows(tmp_path, groups[2].description)] == list(range(14, 21))
    entries = [
        i
        for g in split_rows(tmp_path, "x.json", 9, key="more")
        for i in read_rows(tmp_path, g.description)
    ]
    assert {i.key: i.value for i in entries} == whole["more"]
    assert entries[3].where == "x.json[key 3é]"
    places = [
        (n, row.start, row.end) for n, row in enumerate(scan_rows(tmp_path / "x.json", "rows"))
    ]
    assert {i.number: i.value for i in read_rows_at(tmp_path / "x.json", reversed(places))} == dict(
        enumerate(values)
    )
    entry = list(scan_rows(tmp_path / "x.json", "more"))[5]
    [found] = read_rows_at(tmp_path / "x.json", [(5, entry.start, entry.end)], entries=True)
    assert (found.key, found.value) == ("key 5é", values[5])
    assert has_key(tmp_path / "x.json", "more")
    assert not has_key(tmp_path / "x.json", "key 0é")


def test_rows_are_counted_by_split(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"s": "abc"[i % 3], "n": i % 4} for i in range(50)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    groups = list(split_rows(tmp_path, "x.json", 10, count=lambda r: {r.value["s"]: r.value["n"]}))
    for split in "abc":
        mine = [g for g in groups if g.split == split]
        assert sum(g.count or 0 for g in mine) == sum(r["n"] for r in rows if r["s"] == split)
        assert [
            i.value
            for g in mine
            for i in read_rows(tmp_path, g.description)
            if i.value["s"] == split
        ] == [r for r in rows if r["s"] == split]


def test_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a": "é"}\nbroken\n{"a": 3}')
    [group] = split_rows(tmp_path, "x.jsonl", 10)
    assert [(i.number, i.value) for i in read_rows(tmp_path, group.description)] == [
        (0, {"a": 1}),
        (1, {"a": "é"}),
        (2, None),
        (3, {"a": 3}),
    ]


def test_a_lone_carriage_return_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\r\n{"a":\r2}\n\r\n{"a": 3}\r\n')
    groups = list(split_rows(tmp_path, "x.jsonl", 2))
    assert [g.count for g in groups] == [2, 1]
    assert [
        (i.number, i.value["a"]) for g in groups for i in read_rows(tmp_path, g.description)
    ] == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]


@pytest.mark.parametrize(
    "text", ['[1, 2, {"a": ', "[1, 2", "[1 2]", '{"rows": [1, nope]}', '{"rows" [1]}', "17", '["a']
)
def test_what_is_broken_is_named_by_its_place(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(OneLLMError, match=r"x\.json: at byte \d+: "):
        list(scan_rows(tmp_path / "x.json", "rows" if text[0] == "{" else None))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": []}')
    with pytest.raises(UsageError, match=r"x\.json has no key 'rows'"):
        list(scan_rows(tmp_path / "x.json", "rows"))
    with pytest.raises(UsageError, match="no such file"):
        list(scan_rows(tmp_path / "y.json"))
    (tmp_path / "x.json").write_text("[1, 2, 3]")
    [group] = split_rows(tmp_path, "x.json", 10)
    (tmp_path / "x.json").write_text("[1, 2")
    with pytest.raises(OneLLMError, match="are not rows any more"):
        list(read_rows(tmp_path, {**group.description, "start": 0}))


@pytest.mark.seconds
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("w") as file:
        file.write('{"images": [')
        for i in range(40_000):
            file.write(f'{{"id": {i}, "text": "{"x" * 500}"}}{"," if i < 39_999 else ""}')
        file.write('], "rows": [1, 2]}')
    tracemalloc.start()
    assert [r.value for r in scan_rows(tmp_path / "x.json", "rows")] == [1, 2]
    assert sum(g.count or 0 for g in split_rows(tmp_path, "x.json", 1000, key="images")) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x.json").stat().st_size > 20_000_000
    assert peak < 8_000_000
