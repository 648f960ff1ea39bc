"""webvid: CSV with a tree of videos, and video2dataset's tars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_builds import build_recipe
from shard_worlds import write_tree
from source_checks import build_source, decode_sample, get_reasons, make_film, read_samples
from source_trees import write_download

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.task import TooManyFailuresError
from onellm_dist.shards.sources.webvid import SOURCE, parse_duration

RECIPE = Path(__file__).parents[3] / "shards/webvid.yaml"
HEADER = "videoid,contentUrl,duration,page_dir,name\n"


def url(number: int) -> str:
    return f"https://ak.picdn.net/shutterstock/videos/{number}/preview/stock-footage.mp4"


def webvid(root: Path) -> Path:
    """Names with commas, quotes and a line break, as in the real CSV; wrong durations."""
    rows = [
        f'1001,{url(1001)},PT00H00M11S,000001_000050,"Aerial shot, winter forest"',
        f'1002,{url(1002)},PT01H02M03S,000001_000050,"A ""quoted"" word"',
        f'1003,{url(1003)},soon,000051_000100,"Two\nlines"',
        f"1004,{url(1004)},,000051_000100,Plain",
    ]
    files: dict[str, bytes | str] = {"results_2M_train.csv": HEADER + "\n".join(rows) + "\n"}
    files["results_2M_val.csv"] = f"{HEADER}2001,{url(2001)},PT00H00M02S,000101_000150,Validation\n"
    for number, folder in (
        (1001, "000001_000050"),
        (1002, "000001_000050"),
        (1003, "000051_000100"),
        (1004, "000051_000100"),
    ):
        files[f"videos/{folder}/{number}.mp4"] = make_film(seed=number)
    files["videos/000101_000150/2001.mp4"] = make_film(seed=2001)
    return write_tree(root, files)


def test_the_csv_and_its_videos_come_through_field_by_field(tmp_path: Path) -> None:
    report, dataset = build_source("webvid", webvid(tmp_path / "in"), tmp_path / "out", rows=2)
    found = read_samples(dataset)
    assert {k: s["txt"] for k, s in found.items()} == {
        "1001": "Aerial shot, winter forest",
        "1002": 'A "quoted" word',
        "1003": "Two\nlines",
        "1004": "Plain",
    }
    assert found["1002"]["mp4"] == make_film(seed=1002)
    assert found["1001"]["json"] == {
        "videoid": "1001",
        "url": url(1001),
        "duration": "PT00H00M11S",
        "duration_seconds": 11.0,
        "page_dir": "000001_000050",
    }
    assert (
        found["1002"]["json"]["duration_seconds"] == 3723.0
    )  # wrong (the film lasts 1.5 s), and kept
    assert found["1003"]["json"]["duration"] == "soon"
    assert "duration_seconds" not in found["1003"]["json"]
    assert "duration" not in found["1004"]["json"]
    assert read_samples(dataset, "val")["2001"]["txt"] == "Validation"
    assert not report.quarantined
    assert decode_sample(dataset, "1001")["video"].std() > 0.1


def test_groups_are_reached_without_the_rows_before_them(tmp_path: Path) -> None:
    """A range's raw_samples are the same when nothing before its offset is readable."""
    webvid(tmp_path / "in")
    assert SOURCE.plan is not None
    assert SOURCE.raw_samples is not None
    options: dict[str, Any] = {
        "rows": 1,
        "videos": "videos",
        "missing": "fail",
        "unfinished": "refuse",
    }
    groups = list(SOURCE.plan(tmp_path / "in", seed=0, **options).input_splits)
    assert [(g.name, g.count) for g in groups[:4]] == [
        (f"results_2M_train.csv:{n}", 1) for n in (2, 3, 4, 6)
    ]
    before = [list(SOURCE.raw_samples(tmp_path / "in", g.description, **options)) for g in groups]
    table = tmp_path / "in/results_2M_train.csv"
    offset = groups[2].description["range"][0]
    table.write_bytes(b"\x00" * offset + table.read_bytes()[offset:])
    assert [
        list(SOURCE.raw_samples(tmp_path / "in", g.description, **options)) for g in groups[2:]
    ] == before[2:]


def test_bad_rows_and_videos_are_left_out_one_by_one(tmp_path: Path) -> None:
    webvid(tmp_path / "in")
    (tmp_path / "in/videos/000001_000050/1002.mp4").write_bytes(make_film(seed=1002)[:300])
    (tmp_path / "in/videos/000051_000100/1004.mp4").unlink()
    with (tmp_path / "in/results_2M_train.csv").open("ab") as file:
        file.write(f"1005,{url(1005)},PT00H00M01S,000001_000050\n".encode())  # four cells
        file.write(f'1006,{url(1006)},PT00H00M01S,000001_000050,"never closed\n'.encode())
        file.write(f"1001,{url(1001)},PT00H00M11S,000001_000050,the same video again\n".encode())
        file.write(f"1007,{url(1007)},PT00H00M01S,000001_000050,\n".encode())
        file.write(f"../1008,{url(1008)},PT00H00M01S,000001_000050,outside\n".encode())
        file.write(f"1009,{url(1009)},PT00H00M01S,000001_000050,caf\xe9\n".encode("latin-1"))
    for number in (1007, 1009):
        (tmp_path / f"in/videos/000001_000050/{number}.mp4").write_bytes(make_film(seed=number))
    report, dataset = build_source("webvid", tmp_path / "in", tmp_path / "out", max_failures=0.8)
    assert list(read_samples(dataset)) == ["1001", "1003"]
    found = {q.file: q.reason for q in report.quarantined}
    assert found["results_2M_train.csv:7"] == "unreadable row: 4 columns where the header has 5"
    assert found["results_2M_train.csv:8"] == "unreadable row: a quote is opened and not closed"
    assert found["results_2M_train.csv:9"] == "duplicate key: an earlier sample has it"
    assert found["results_2M_train.csv:10"] == "empty caption"
    assert found["results_2M_train.csv:11"] == "unreadable row: the videoid is '../1008'"
    assert found["results_2M_train.csv:12"].startswith("caption is not UTF-8")
    by_key = get_reasons(report)
    assert by_key["1002"].startswith("unreadable video")
    assert by_key["1004"].startswith("missing file")
    with pytest.raises(TooManyFailuresError):
        build_dataset("webvid", tmp_path / "in", tmp_path / "other")


def test_a_set_that_was_fetched_in_part(tmp_path: Path) -> None:
    webvid(tmp_path / "in")
    for name in ("000001_000050/1001", "000051_000100/1003", "000051_000100/1004"):
        (tmp_path / f"in/videos/{name}.mp4").unlink()
    _, dataset = build_source("webvid", tmp_path / "in", tmp_path / "out", missing="skip")
    assert list(read_samples(dataset)) == ["1002"]
    assert json.loads((tmp_path / "out/statistics.json").read_text())["left_out"] == {
        "media was not fetched": 3
    }


def test_tars_of_video2dataset(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "url": url(i),
            "caption": f"film {i}",
            "videoid": str(i),
            "page_dir": "x",
            "duration": "PT00H00M02S",
            "media": make_film(seed=i),
        }
        for i in range(3)
    ]
    rows.insert(
        1, {**rows[0], "status": "failed_to_download", "error_message": "HTTP 403", "media": None}
    )
    write_download(tmp_path / "in", 0, rows, extension="mp4", failures_in_tar=True)
    for table in ("with", "without"):
        _, dataset = build_source("webvid", tmp_path / "in", tmp_path / table)
        found = read_samples(dataset)
        assert {k: s["txt"] for k, s in found.items()} == {
            "0000000": "film 0",
            "0000002": "film 1",
            "0000003": "film 2",
        }
        assert found["0000002"]["mp4"] == make_film(seed=1)
        assert found["0000002"]["json"]["url"] == url(1)
        statistics = json.loads((tmp_path / table / "statistics.json").read_text())
        assert statistics["left_out"] == {"failed_to_download": 1}
        (tmp_path / "in/00000.parquet").unlink(missing_ok=True)
    (tmp_path / "in/00000_stats.json").unlink()
    with pytest.raises(UsageError, match="1 of 1 tar is unfinished"):
        build_dataset("webvid", tmp_path / "in", tmp_path / "out")


def test_other_csvs_and_empty_folders_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path / "in", {"a.csv": "file,text\n1,2\n"})
    with pytest.raises(UsageError, match=r"a.csv: its columns are file, text"):
        build_dataset("webvid", tmp_path / "in", tmp_path / "out")
    write_tree(tmp_path / "empty", {"a.csv": ""})
    with pytest.raises(UsageError, match=r"a.csv is empty"):
        build_dataset("webvid", tmp_path / "empty", tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="has no tar"):
        build_dataset("webvid", tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("PT00H00M11S", 11.0),
        ("PT01H02M03S", 3723.0),
        ("PT5S", 5.0),
        ("PT2M", 120.0),
        ("P", None),
        ("11", None),
    ],
)
def test_durations(text: str, value: float | None) -> None:
    assert parse_duration(text) == value


def test_the_recipe_builds(tmp_path: Path) -> None:
    tree = webvid(tmp_path / "in")
    _, report = build_recipe(RECIPE, inputs=str(tree), out=str(tmp_path / "out"), workers=1)
    assert report.samples == 5
