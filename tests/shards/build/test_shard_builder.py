"""The builder of large datasets: filters, duplicates, cuts, stores, Energon's files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import sqlite3
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from PIL import Image
from shard_rows import build, register_rows, write_rows
from shard_worlds import all_bytes, array, contents, picture, sound, write_tree

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards import build_dataset, open_dataset
from onellm_dist.shards.build import task as task_module
from onellm_dist.shards.build.build_dataset import format_summary
from onellm_dist.shards.build.duplicates import find_duplicates
from onellm_dist.shards.build.task import ROW, TooManyFailuresError
from onellm_dist.shards.build.workers import ArrayTask
from onellm_dist.shards.command import build_command
from onellm_dist.shards.sources.base import FileRange
from onellm_dist.shards.tools.index_existing import index_existing_shards
from onellm_dist.shards.tools.verify import verify_dataset


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    register_rows(monkeypatch)


# -- what is left out


def test_what_is_left_out_is_reported(tmp_path: Path) -> None:
    report = build(write_rows(tmp_path / "in"), tmp_path / "out")
    reasons = {"k007": "empty caption", "k003": "duplicate key: an earlier sample has it"}
    assert {q.key: q.reason for q in report.quarantined} == reasons
    assert report.samples == 56
    assert "left out knowingly: 1 x not wanted" in format_summary(report, tmp_path / "out")
    found = contents(open_dataset(tmp_path / "out"))
    assert found["k003"]["txt"] == b"caption number 3"
    assert json.loads(found["k003"]["json"]) == {"url": "http://caption number 3"}
    found_statistics = json.loads((tmp_path / "out/statistics.json").read_text())
    assert (
        found_statistics["raw_samples"],
        found_statistics["samples"],
        found_statistics["left_out"],
    ) == (
        60,
        56,
        {"duplicate: exact": 1, "not wanted": 1},
    )
    assert verify_dataset(tmp_path / "out") == []


def pictures(folder: Path) -> Path:
    """Write four photos (of low frequencies, so that copies look alike), a copy, a smaller copy."""
    files: dict[str, bytes | str] = {}
    for i in range(4):
        grid = np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        image = Image.fromarray(grid).resize((180, 120), Image.Resampling.BICUBIC)
        for name, size in ((f"p{i}", (180, 120)), *([("small", (90, 60))] if i == 1 else [])):
            buffer = io.BytesIO()
            image.resize(size).save(buffer, "JPEG", quality=92)
            files[f"{name}.jpg"] = buffer.getvalue()
    files["q.jpg"] = files["p2.jpg"]
    for i, name in enumerate(sorted(files)):
        meta = {
            "caption": name,
            "URL": f"http://x/{name}",
            "punsafe": i / 10,
            "NSFW": "UNLIKELY" if i else "NSFW",
            "Similarity": 0.3 - i / 100,
        }
        files[name.replace(".jpg", ".json")] = json.dumps(meta)
    return write_tree(folder, files)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ["p0", "p1", "p2", "p3", "q", "small"]),
        ({"dedup": "exact"}, ["p0", "p1", "p2", "p3", "small"]),
        ({"dedup": "perceptual", "dedup_distance": 3}, ["p0", "p1", "p2", "p3"]),
        ({"max_punsafe": 0.25}, ["p0", "p1", "p2"]),
        ({"min_similarity": 0.275}, ["p0", "p1", "p2"]),
        ({"dedup": "perceptual", "min_similarity": 0.26}, ["p0", "p1", "p2", "p3"]),
        ({"max_pwatermark": 0.5, "max_failures": 0.0}, None),
        ({"nsfw": "unlikely,unsure"}, ["p1", "p2", "p3", "q", "small"]),
        ({"limit": 2}, ["p0", "p1"]),
    ],
)
@pytest.mark.seconds
def test_duplicates_and_filters(
    tmp_path: Path, options: dict[str, Any], kept: list[str] | None
) -> None:
    inputs = pictures(tmp_path / "in")
    if kept is None:  # the value that the threshold is for is in no sample
        with pytest.raises(OneLLMError, match="all 6 samples were left out by filters"):
            build_dataset("folder", inputs, tmp_path / "out", options=options)
        return
    build_dataset("folder", inputs, tmp_path / "out", options=options)
    assert list(contents(open_dataset(tmp_path / "out"))) == kept


def test_the_denylist_has_urls_and_hashes(tmp_path: Path) -> None:
    inputs = pictures(tmp_path / "in")
    denied = hashlib.sha256((inputs / "p3.jpg").read_bytes()).hexdigest().upper()
    (tmp_path / "deny.txt").write_text(f"# takedowns\nhttp://x/p0.jpg\n{denied}\n")
    report = build_dataset(
        "folder", inputs, tmp_path / "out", options={"denylist": tmp_path / "deny.txt"}
    )
    assert list(contents(open_dataset(tmp_path / "out"))) == ["p1", "p2", "q", "small"]
    assert "left out knowingly: 2 x denylist" in report.notes
    with pytest.raises(UsageError, match="no such denylist"):
        build_dataset(
            "folder", inputs, tmp_path / "other", options={"denylist": tmp_path / "none.txt"}
        )


def test_filters_that_leave_nothing_build_nothing(tmp_path: Path) -> None:
    with pytest.raises(OneLLMError, match="all 6 samples were left out by filters"):
        build_dataset(
            "folder", pictures(tmp_path / "in"), tmp_path / "out", options={"max_punsafe": -1}
        )
    assert os.listdir(tmp_path) == ["in"]


def test_pictures_are_made_smaller_where_asked(tmp_path: Path) -> None:
    inputs = pictures(tmp_path / "in")
    build_dataset("folder", inputs, tmp_path / "out", options={"resize": 64, "quality": 80})
    found = contents(open_dataset(tmp_path / "out"))
    assert {k: Image.open(io.BytesIO(v["jpg"])).size for k, v in found.items()} == {
        **dict.fromkeys(("p0", "p1", "p2", "p3", "q"), (96, 64)),
        "small": (90, 60),
    }
    build_dataset("folder", inputs, tmp_path / "as_is", options={"resize": 60})
    as_is = contents(open_dataset(tmp_path / "as_is"))
    assert (
        as_is["small"]["jpg"] == (inputs / "small.jpg").read_bytes()
    )  # small enough, no quality asked for
    assert Image.open(io.BytesIO(as_is["p0"]["jpg"])).size == (90, 60)


def test_a_picture_with_a_depth_map_keeps_its_size(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.jpg": picture(0),
        "a.depth.npy": array((24, 32)),
        "a.txt": "x",
    }
    build_dataset(
        "folder", write_tree(tmp_path / "in", files), tmp_path / "out", options={"resize": 8}
    )
    assert contents(open_dataset(tmp_path / "out"))["a"]["jpg"] == files["a.jpg"]


def test_near_pictures_are_found_as_a_comparison_of_all_pairs_finds_them(tmp_path: Path) -> None:
    """Random hashes with planted neighbours at 0 to 6 bits; buckets smaller than the data."""
    draw = random.Random(0)
    hashes = [draw.getrandbits(64) for _ in range(300)]
    for _ in range(300):
        near = draw.choice(hashes)
        for bit in draw.sample(range(64), draw.randint(0, 6)):
            near ^= 1 << bit
        hashes.append(near)
    draw.shuffle(hashes)
    rows = np.zeros(len(hashes), ROW)
    rows["picture"] = hashes
    rows["content"] = np.arange(2 * len(hashes)).reshape(-1, 2)
    tasks = [(u, rows[u * 100 : u * 100 + 100]) for u in range(6)]
    for distance in range(4):
        expected = {
            (i // 100, i % 100)
            for i in range(600)
            if any((hashes[i] ^ hashes[j]).bit_count() <= distance for j in range(i))
        }
        for capacity in (1000, 150):
            found = find_duplicates(
                lambda: iter(tasks),
                keys=False,
                dedup="perceptual",
                distance=distance,
                scratch=tmp_path,
                capacity=capacity,
            )
            assert {(u, r) for u, rs in found.items() for r in rs} == expected


def test_a_sample_dropped_for_its_key_drops_no_equal_media(tmp_path: Path) -> None:
    rows = np.zeros(4, ROW)
    rows["key"], rows["content"], rows["picture"] = (
        [[1, 0], [1, 0], [2, 0], [3, 0]],
        [[5, 5], [6, 6], [6, 6], [6, 6]],
        [1, 2, 2, 2],
    )
    for dedup in ("exact", "perceptual"):
        found = find_duplicates(
            lambda: iter([(0, rows)]), keys=True, dedup=dedup, distance=0, scratch=tmp_path
        )
        assert found == {0: {1: "key", 3: "exact"}}


@pytest.mark.parametrize("kind", ["audio", "depth"])
def test_near_copies_are_not_looked_for_without_pictures(tmp_path: Path, kind: str) -> None:
    files: dict[str, bytes | str] = {f"{i}.txt": str(i) for i in range(4)}
    for i in range(4):
        files.update(
            {f"{i}.wav": sound(i)}
            if kind == "audio"
            else {f"{i}.jpg": picture(i), f"{i}.depth.npy": array((24, 32))}
        )
    with pytest.raises(
        UsageError, match=f"dedup=perceptual, and samples of {kind} have no picture"
    ):
        build_dataset(
            "folder",
            write_tree(tmp_path / "in", files),
            tmp_path / "out",
            options={"dedup": "perceptual"},
        )
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.seconds
def test_bad_samples_beyond_those_held_in_memory_are_counted_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"k{i}:{'' if i % 3 == 2 else 'text'}" for i in range(60)]
    inputs = write_tree(tmp_path / "in", {"rows.txt": "\n".join(lines)})
    whole = build(inputs, tmp_path / "whole", max_failures=0.5, dedup="none")
    assert (len(whole.quarantined), whole.failures) == (20, 20)
    monkeypatch.setattr(task_module, "LISTED", 7)
    build(
        inputs, tmp_path / "out", max_failures=0.5, dedup="none", task=ArrayTask(0, 2)
    )  # the others' are taken from their records
    report = build(inputs, tmp_path / "out", max_failures=0.5, dedup="none", task=ArrayTask(1, 2))
    assert (report.quarantined, report.failures) == (whole.quarantined[:7], 20)
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")
    assert [json.loads(line)["key"] for line in (tmp_path / "out/quarantine.jsonl").open()] == [
        f"k{i}" for i in range(2, 60, 3)
    ]
    assert (
        f"left out: 20 (all in {tmp_path}/out/quarantine.jsonl); of the first 7:"
        in format_summary(report, tmp_path / "out")
    )
    with pytest.raises(TooManyFailuresError, match="13 of the first") as caught:
        build(inputs, tmp_path / "given_up", max_failures=0.2, dedup="none")
    assert len(caught.value.bad) == 7


def test_samples_that_all_fail_alike_are_not_the_datas_fault(tmp_path: Path) -> None:
    inputs = write_tree(tmp_path / "in", {"rows.txt": "\n".join(f"k{i}:" for i in range(100))})
    with pytest.raises(TooManyFailuresError, match=r"all fail alike \(empty caption\)") as caught:
        build(inputs, tmp_path / "out")
    assert "a library, the environment or the recipe" in caught.value.why
    assert "max_failures" not in caught.value.do
    lines = ["k:text", *(f"k{i}:" for i in range(99))]
    inputs = write_tree(tmp_path / "mixed", {"rows.txt": "\n".join(lines)})
    with pytest.raises(TooManyFailuresError) as caught:
        build(inputs, tmp_path / "out")
    assert "alike" not in caught.value.what and "max_failures" in caught.value.do


def test_too_many_failures_count_over_all_shards(tmp_path: Path) -> None:
    lines = [f"k{i}:{'' if i % 6 == 5 else 'text'}" for i in range(60)]
    inputs = write_tree(tmp_path / "in", {"rows.txt": "\n".join(lines)})
    with pytest.raises(TooManyFailuresError, match="bad samples: 7 of the first 42"):
        build(inputs, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out.quarantine.jsonl"]


# -- shards


def test_shards_are_cut_by_bytes(tmp_path: Path) -> None:
    build(write_rows(tmp_path / "in"), tmp_path / "out", max_bytes=200, dedup="none")
    dataset = open_dataset(tmp_path / "out")
    assert [s.path for s in dataset.shards()][:2] == [
        "shards/train-000000.tar",
        "shards/train-000000_01.tar",
    ]
    assert all(s.samples < 8 for s in dataset.shards())
    assert dataset.samples() == 57
    assert verify_dataset(tmp_path / "out") == []


def test_a_dry_run_reports_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = pictures(tmp_path / "in")
    (inputs / "p1.jpg").write_bytes(b"broken")
    assert (
        build_command(
            "folder",
            [inputs, tmp_path / "out"],
            ["max_samples=4"],
            workers=1,
            seed=0,
            overwrite=False,
            dry_run=True,
        )
        == 0
    )
    text = capsys.readouterr().out
    expected = (
        "1 input split, 6 raw samples of image",
        "2 shards or more (train: 2)",
        "tried 6: 5 good, about",
        "p1.jpg: unreadable image",
    )
    for line in (*expected, "nothing was written"):
        assert line in text
    assert os.listdir(tmp_path) == ["in"]


def test_a_remote_store_gets_the_same_bytes(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path / "in")
    build(inputs, tmp_path / "out")
    store = fsspec.filesystem("memory")
    for path in inputs.iterdir():
        store.pipe_file(f"/lake/in/{path.name}", path.read_bytes())
    build("memory://lake/in", "memory://lake/out", task=ArrayTask(0, 2))  # type: ignore[arg-type]
    assert not store.exists("/lake/out/manifest.json")
    build("memory://lake/in", "memory://lake/out", task=ArrayTask(1, 2))  # type: ignore[arg-type]
    assert {
        k.removeprefix("/lake/out/"): store.cat(k) for k in store.find("/lake/out")
    } == all_bytes(tmp_path / "out")
    with pytest.raises(UsageError, match="already holds a dataset"):
        build("memory://lake/in", "memory://lake/out")  # type: ignore[arg-type]
    store.rm("/lake", recursive=True)


def test_parts_may_be_byte_ranges(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"0123456789")
    assert FileRange(tmp_path / "blob", 3, 4).read_bytes() == b"3456"
    with pytest.raises(OneLLMError, match="truncated file: blob has 2 of 4 bytes at offset 8"):
        FileRange(tmp_path / "blob", 8, 4).read_bytes()


# -- Energon


def test_energons_files_locate_every_part(tmp_path: Path) -> None:
    build(write_rows(tmp_path / "in"), tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    info = json.loads((tmp_path / "out/.nv-meta/.info.json").read_text())
    assert info["shard_counts"] == {s.path: s.samples for s in dataset.shards()}
    assert yaml.safe_load((tmp_path / "out/.nv-meta/split.yaml").read_text())["split_parts"][
        "train"
    ] == [s.path for s in dataset.shards()]
    for shard in dataset.shards():
        starts = np.fromfile(tmp_path / "out" / f"{shard.path}.idx", "<u8")
        assert [int(starts[0]), len(starts)] == [0, shard.samples + 1]
    database = sqlite3.connect(tmp_path / "out/.nv-meta/index.sqlite")
    tars = list(info["shard_counts"])
    rows = database.execute(
        """SELECT tar_file_id, sample_key, part_name, content_byte_offset, content_byte_size
        FROM samples JOIN sample_parts USING (tar_file_id, sample_index)"""
    ).fetchall()
    database.close()
    found: dict[str, dict[str, bytes]] = {}
    for tar, key, part, offset, size in rows:
        found.setdefault(key, {})[part] = FileRange(
            tmp_path / "out" / tars[tar], offset, size
        ).read_bytes()
    assert found == contents(dataset)


def test_sets_that_energon_prepared_are_indexed_by_its_splits(tmp_path: Path) -> None:
    build(write_rows(tmp_path / "in"), tmp_path / "out", max_samples=20)
    os.unlink(tmp_path / "out/manifest.json")
    names = [f"shards/train-00000{i}.tar" for i in range(3)]
    split = {
        "split_parts": {"train": [names[0]], "val": ["shards/train-{000001..000002}.tar"]},
        "exclude": [f"{names[2]}/k050"],
    }
    (tmp_path / "out/.nv-meta/split.yaml").write_text(yaml.safe_dump(split))
    with pytest.raises(
        UsageError, match=r"excludes 1 single samples, of which shards/train-000002\.tar/k050 is"
    ):
        index_existing_shards(tmp_path / "out", modalities=())
    (tmp_path / "out/.nv-meta/split.yaml").write_text(
        yaml.safe_dump({**split, "exclude": ["shards/train-{000002..000007}.tar"]})
    )
    index_existing_shards(tmp_path / "out", modalities=())
    dataset = open_dataset(tmp_path / "out")
    assert {s: [i.path for i in dataset.shards(s)] for s in dataset.splits} == {
        "train": names[:1],
        "val": names[1:2],
    }
