"""`onellm shards build folder` with captions in a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from shard_worlds import array, contents, picture, sound, split_arguments, write_tree

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.sources.base import BuildReport

MEDIA = {f"media/{i}.jpg": picture(i) for i in range(4)}


def build(
    tmp_path: Path, files: Mapping[str, bytes | str], inputs: str = "in", **options: Any
) -> tuple[BuildReport, Dataset]:
    write_tree(tmp_path / "in", files)
    report = build_dataset(
        "folder",
        tmp_path / inputs,
        tmp_path / "out",
        **split_arguments({"max_failures": 0.9, **options}),
    )
    return report, open_dataset(tmp_path / "out")


def captions(dataset: Dataset) -> dict[str, str]:
    return {k: p["txt"].decode() for k, p in contents(dataset).items()}


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("captions.csv", 'file,caption\nmedia/0.jpg,plain\nmedia/1.jpg,"a, ""b""\nand c"\n'),
        (
            "captions.csv",
            '\ufefffile_name;text\r\nmedia/0.jpg;plain\r\nmedia/1.jpg;"a, ""b""\r\nand c"\r\n',
        ),
        ("any.tsv", 'CAPTION\tURL\nplain\tmedia/0.jpg\n"a, ""b"" and c"\tmedia/1.jpg\n'),
        ("laion.csv", 'caption\turl\nplain\tmedia/0.jpg\na, "b" and c\tmedia/1.jpg\n'),
        (
            "metadata.jsonl",
            '{"file_name": "media/0.jpg", "text": "plain"}\n\n'
            '{"file_name": "media/1.jpg", "text": "a, \\"b\\" and c"}\n',
        ),
    ],
)
def test_a_table_at_the_top_is_found(tmp_path: Path, name: str, table: str) -> None:
    """CSV by RFC 4180, semicolons, byte order mark, TSV, tab-separated .csv, metadata.jsonl."""
    report, dataset = build(tmp_path, {**MEDIA, name: table})
    assert not report.quarantined
    found = {k: " ".join(v.split()) for k, v in captions(dataset).items()}
    assert found == {"media/0": "plain", "media/1": 'a, "b" and c'}
    assert contents(dataset)["media/1"]["jpg"] == MEDIA["media/1.jpg"]


def test_quotes_of_an_unquoted_tsv_swallow_no_rows(tmp_path: Path) -> None:
    table = 'caption\turl\n"half quoted\tmedia/0.jpg\nof 12" pipes\tmedia/1.jpg\n'
    _, dataset = build(tmp_path, {**MEDIA, "x.tsv": table})
    assert captions(dataset) == {"media/0": '"half quoted', "media/1": 'of 12" pipes'}


def test_the_table_itself_or_an_option_names_it(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        **MEDIA,
        "a.csv": "path,title\nmedia/0.jpg,from a\n",
        "b.csv": "path,title\nmedia/1.jpg,from b\n",
    }
    with pytest.raises(UsageError, match=r"has 2 tables: a\.csv, b\.csv"):
        build(tmp_path, files)
    assert captions(build(tmp_path, {}, captions="a.csv")[1]) == {"media/0": "from a"}
    assert captions(build(tmp_path, {}, "in/b.csv", overwrite=True)[1]) == {"media/1": "from b"}
    rows = json.dumps(
        [
            {
                "image": "media/2.jpg",
                "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
            }
        ]
    )
    _, dataset = build(tmp_path, {"llava.json": rows}, captions="llava.json", overwrite=True)
    assert json.loads(contents(dataset)["media/2"]["json"]) == {
        "conversations": json.loads(rows)[0]["conversations"]
    }


def test_media_that_are_csv_are_no_table(tmp_path: Path) -> None:
    trace = (
        "component_idx,component_timestamp_ms,canonical_timestamp_ms,"
        "gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z\n"
    )
    trace += "".join(f"0,{5 * i}.0,{5 * i}.0,0.1,0.2,0.3,1.0,2.0,3.{i % 10}\n" for i in range(420))
    report, dataset = build(tmp_path, {"walk.csv": trace, "walk.txt": "walking"}, modality="imu")
    assert not report.quarantined
    assert captions(dataset) == {"walk": "walking"}


def test_other_columns_go_to_the_json(tmp_path: Path) -> None:
    table = {
        "file": "media/0.jpg",
        "caption": "x",
        "id": 17,
        "width": 32,
        "tags": ["a"],
        "none": None,
    }
    _, dataset = build(tmp_path, {**MEDIA, "t.jsonl": json.dumps(table)})
    sample = contents(dataset)["17"]
    assert json.loads(sample["json"]) == {"width": 32, "tags": ["a"]}
    assert sample["txt"] == b"x"


def test_several_rows_of_one_file_keep_the_tables_order(tmp_path: Path) -> None:
    """COCO has five captions an image; each row is a sample."""
    _, dataset = build(
        tmp_path,
        {**MEDIA, "t.csv": "file,caption\nmedia/3.jpg,one\nmedia/0.jpg,two\nmedia/3.jpg,three\n"},
    )
    assert list(captions(dataset).items()) == [
        ("media/3", "one"),
        ("media/0", "two"),
        ("media/3-2", "three"),
    ]


def test_columns_named_after_parts(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "rgb/0.png": picture(0, "PNG"),
        "maps/0.png": picture(1, "PNG"),
        "t.csv": "image,depth_image,caption\nrgb/0.png,maps/0.png,x\n",
    }
    _, dataset = build(tmp_path, files)
    assert dataset.modalities == ("depth",)
    parts = contents(dataset)["rgb/0"]
    assert (parts["png"], parts["depth.png"]) == (files["rgb/0.png"], files["maps/0.png"])


def test_a_generic_column_fills_what_the_others_leave(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "rgb/0.jpg": picture(0),
        "maps/0.png": picture(1, "PNG"),
        "t.csv": "path,depth,caption\nrgb/0.jpg,maps/0.png,x\n",
    }
    _, dataset = build(tmp_path, files)
    assert dataset.modalities == ("depth",)
    assert set(next(iter(contents(dataset).values()))) == {"jpg", "depth.png", "txt"}


def test_parts_without_a_column_are_looked_for_beside_the_file(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "m/0.jpg": picture(0),
        "m/0.normal.png": picture(1, "PNG"),
        "t.csv": "file,caption\nm/0.jpg,x\n",
    }
    _, dataset = build(tmp_path, files, modality="normal")
    assert set(contents(dataset)["m/0"]) == {"jpg", "normal.png", "txt"}


def test_joint_samples_of_equal_file_types_do_not_clash(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a/0.npy": array((6, 400)),
        "b/0.npy": array((15724,)),
        "t.jsonl": '{"imu": "a/0.npy", "fmri": "b/0.npy", "text": "x"}',
    }
    report, dataset = build(tmp_path, files, modality="imu,fmri")
    assert not report.quarantined
    parts = next(iter(contents(dataset).values()))
    assert (parts["imu.npy"], parts["fmri.npy"]) == (files["a/0.npy"], files["b/0.npy"])


def test_an_image_column_may_hold_other_media(tmp_path: Path) -> None:
    """The paper's instruction files call every file `image`."""
    _, dataset = build(
        tmp_path, {"0.wav": sound(0), "t.jsonl": '{"image": "0.wav", "caption": "x"}'}
    )
    assert dataset.modalities == ("audio",)


def test_text_rows(tmp_path: Path) -> None:
    _, dataset = build(
        tmp_path,
        {"t.jsonl": '{"caption": "one"}\n{"caption": "two", "id": "b"}\n'},
        captions="t.jsonl",
        modality="text",
    )
    assert captions(dataset) == {"row-000000000": "one", "b": "two"}


def test_columns_chosen_by_the_user(tmp_path: Path) -> None:
    _, dataset = build(
        tmp_path,
        {**MEDIA, "t.csv": "where,What,caption\nmedia/0.jpg,mine,theirs\n"},
        captions="t.csv",
        file_column="where",
        caption_column="What",
    )
    assert contents(dataset)["media/0"]["txt"] == b"mine"


def test_bad_rows_are_left_out_one_by_one(tmp_path: Path) -> None:
    rows = [
        b"file,caption",
        b"media/0.jpg,good",
        b"media/9.jpg,missing",
        b"media/1.jpg,caf\xe9",
        b"media/2.jpg,",
        b"media/3.jpg",
        b"https://example.org/0.jpg,remote",
        b",nothing",
        b"t.csv,no media",
        b"broken.jpg,broken",
        b"media/1.jpg,good again",
    ]
    report, dataset = build(
        tmp_path, {**MEDIA, "broken.jpg": b"x", "t.csv": b"\n".join(rows)}, modality="image"
    )
    assert captions(dataset) == {"media/0": "good", "media/1-2": "good again"}
    found = [(Path(q.file).name, q.reason) for q in report.quarantined]
    expected = [
        ("t.csv:3", "missing file: media/9.jpg"),
        ("t.csv:4", "caption is not UTF-8: byte 0xe9 at character 3"),
        ("t.csv:5", "empty caption"),
        ("t.csv:6", "unreadable row: 1 columns"),
        ("t.csv:7", "remote file: https://example.org/0.jpg"),
        ("t.csv:8", "missing file: the row names none"),
        ("t.csv:9", "missing part: no image part"),
        ("t.csv:10", "unreadable image: "),
    ]
    assert len(found) == len(expected)
    for (place, reason), (expected_place, start) in zip(found, expected, strict=True):
        assert place == expected_place
        assert reason.startswith(start), reason


def test_bad_json_lines(tmp_path: Path) -> None:
    rows = [
        b'{"file": "media/0.jpg", "caption": "good"}',
        b"{broken",
        b"[1]",
        b'{"file": 3, "caption": "x"}',
        b'{"file": "media/1.jpg", "caption": ["a"]}',
        b'{"file": "media/1.jpg", "caption": "\xff"}',
        b'{"file": "media/1.jpg", "caption": "x", "note": "\xff"}',
        b'{"file": "media/2.jpg"}',
    ]
    report, dataset = build(tmp_path, {**MEDIA, "t.jsonl": b"\n".join(rows)})
    assert list(captions(dataset)) == ["media/0"]
    kinds = [q.reason.split(":")[0] for q in report.quarantined]
    assert kinds == ["unreadable row"] * 3 + [
        "caption is not text",
        "caption is not UTF-8",
        "table row is not UTF-8",
        "no caption",
    ]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"t.csv": "a,b\n1,2\n"}, {"captions": "t.csv"}, "no column names a file"),
        ({"t.csv": "file,b\n1,2\n"}, {"captions": "t.csv"}, "no column holds captions"),
        ({"t.csv": ""}, {"captions": "t.csv"}, "columns: none"),
        ({"t.json": "{}"}, {"captions": "t.json"}, "not a JSON list"),
        ({"t.json": "[{"}, {"captions": "t.json"}, "cannot be read"),
        (
            {"t.csv": "file,caption\nx.jpg,y\n"},
            {"captions": "t.csv", "caption_column": "nope"},
            "no column holds captions",
        ),
    ],
)
def test_tables_that_cannot_be_used(
    tmp_path: Path, files: Mapping[str, bytes | str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OneLLMError, match=message):
        build(tmp_path, files, **options)
    assert os.listdir(tmp_path) == ["in"]
