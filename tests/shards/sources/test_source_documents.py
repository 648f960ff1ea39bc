"""Tables and documents that list media: FineVision, LLaVA-OneVision, OBELICS, MMC4."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listed_rows import build, picture, read_all, talk, write_parquet

from onellm_dist.common.errors import UsageError


def test_finevision_with_several_pictures(tmp_path: Path) -> None:
    def held(*seeds: int) -> list[dict[str, Any]]:
        return [{"bytes": picture(s), "path": None} for s in seeds]

    pairs = [{"user": "which", "assistant": "the first"}]
    rows: list[Any] = [
        {"images": held(0, 1, 2), "texts": pairs, "source": "x"},
        {"images": held(3), "texts": pairs, "source": "x"},
        {"images": [], "texts": pairs, "source": "text"},
        {"images": held(0), "texts": [{"user": "<image><image>", "assistant": "a"}], "source": "x"},
    ]
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "train-0.parquet", rows)
    dataset, report = build("finevision", tmp_path / "in", several="list")
    assert [q.reason for q in report.quarantined] == [
        "placeholders: its text has 2 <image> for 1 medium of modality image"
    ]
    found = list(read_all(dataset).values())
    assert [len(meta["media"]) for _, meta in found] == [3, 1, 0]
    assert found[0][0] == {f"{i}.jpg": picture(i) for i in range(3)}
    assert found[0][1]["conversations"][1]["value"] == "the first"


def test_parts_of_two_columns_stay_with_their_medium(tmp_path: Path) -> None:
    """The times of recordings are an optional part: they are not pictures."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)

    def held(array: np.ndarray, name: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return {"bytes": buffer.getvalue(), "path": name}

    motions = [held(rng.standard_normal((6, 400)).astype(np.float32), "m.npy") for _ in range(2)]
    times = [held(np.arange(400) * 5.0 + start, "t.npy") for start in (0, 7)]
    row = {
        "imu": motions,
        "timestamps": times,
        "image": [{"bytes": picture(), "path": "a.jpg"}],
        "caption": "<imu> <image> <imu>",
    }
    write_parquet(tmp_path / "in" / "t.parquet", [row, {**row, "timestamps": times[:1]}])
    dataset, report = build("parquet", tmp_path / "in", modality="imu,image", several="list")
    assert [q.reason for q in report.quarantined] == [
        "unreadable row: timestamps has 1 item for 2 of imu"
    ]
    ((parts, meta),) = read_all(dataset).values()
    assert sorted(meta["media"]) == ["image", "imu", "imu"]
    (number,) = (n for n, name in enumerate(meta["media"]) if name == "image")
    assert parts[f"{number}.jpg"] == picture()
    first, second = (n for n, name in enumerate(meta["media"]) if name == "imu")
    for at, motion, time in zip((first, second), motions, times, strict=True):
        assert parts[f"{at}.imu.npy"] == motion["bytes"]
        assert parts[f"{at}.timestamps.npy"] == time["bytes"]


def test_llava_onevision_keeps_its_placeholders(tmp_path: Path) -> None:
    held = {"bytes": picture(), "path": "a.jpg"}
    rows: list[Any] = [
        {"id": "1", "image": held, "conversations": talk("<image>\nwhat"), "data_source": "s"},
        {"id": "2", "image": None, "conversations": talk("text"), "data_source": "s"},
        {"id": "3", "image": None, "conversations": talk("<image>\nlost"), "data_source": "s"},
    ]
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "train-0.parquet", rows)
    dataset, report = build("llava-onevision", tmp_path / "in", several="list")
    assert [q.reason for q in report.quarantined] == [
        "placeholders: its text has 1 <image> for 0 media of modality image"
    ]
    first, second = (meta for _, meta in read_all(dataset).values())
    assert (first["media"], second["media"]) == (["image"], [])
    assert first["conversations"][0]["value"] == "<image>\nwhat"


URL = "https://site.org/deep/cat.jpg?w=1"


def _write_documents(folder: Path, rows: Sequence[Mapping[str, Any]], name: str) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "cat.jpg").write_bytes(picture(1))
    digest = hashlib.sha256(b"https://a.b/c").hexdigest()
    (folder / "images" / digest).with_suffix(".jpg").write_bytes(picture(2))
    if name.endswith(".parquet"):
        write_parquet(folder / name, rows)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.parquet"])
def test_obelics_documents(tmp_path: Path, name: str) -> None:
    rows: list[Any] = [
        {
            "images": [None, URL, None, "https://a.b/c", "https://gone/x.png"],
            "texts": ["A cat.", None, "Then", None, None],
        },
        {"images": ["https://gone/x.png", None], "texts": [None, "nothing left"]},
        {"images": [None], "texts": ["a", "b"]},
        {"images": [None, URL], "texts": ["has <image> of its own", None]},
        {"images": [URL, "y"], "texts": ["both", None]},
    ]
    dataset, report = build("obelics", _write_documents(tmp_path / "in", rows, name), names="last")
    ((parts, meta),) = read_all(dataset).values()
    assert meta["txt"] == "A cat.\n<image>\nThen\n<image>"
    assert parts == {"0.jpg": picture(1), "1.jpg": picture(2)}
    assert [q.reason for q in report.quarantined] == [
        "unreadable row: 1 image for 2 texts",
        "placeholders: a text of the document has <image> of its own",
        "unreadable row: a piece is not exactly one of image and text",
    ]
    assert any("no picture of the document was fetched" in note for note in report.notes)


def test_two_urls_with_one_last_part_are_not_one_picture(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"images": [URL], "texts": [None]},
        {"images": ["https://other.org/cat.jpg"], "texts": [None]},
        {"images": ["https://a.b/c", URL], "texts": [None, None]},
    ]
    folder = _write_documents(tmp_path / "in", rows, "docs.jsonl")
    dataset, report = build("obelics", folder, names="last")
    assert [q.reason.split(" (")[0] for q in report.quarantined] == [
        f"ambiguous: cat.jpg may be the picture of {URL} or of https://other.org/cat.jpg"
    ]
    assert [set(parts) for parts, _ in read_all(dataset).values()] == [
        {"0.jpg"},
        {"0.jpg", "1.jpg"},
    ]
    (tmp_path / "obelics-out").rename(tmp_path / "before")
    (parts,) = (parts for parts, _ in read_all(build("obelics", folder)[0]).values())
    assert parts == {"0.jpg": picture(2)}  # the one whose file is named by the SHA-256 of its URL
    with pytest.raises(UsageError, match="names=url is neither hash nor last"):
        build("mmc4", folder, names="url")


def test_mmc4_documents(tmp_path: Path) -> None:
    info = [
        {"image_name": "cat.jpg", "raw_url": URL, "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "gone.jpg", "raw_url": "x", "matched_text_index": 0},
    ]
    rows: list[Any] = [
        {"text_list": ["One.", "Two."], "image_info": info, "url": "https://site.org"},
        {"text_list": ["One."], "image_info": info},
        {"text_list": "One."},
    ]
    folder = _write_documents(tmp_path / "in", rows, "docs_shard_0_v2.jsonl")
    dataset, report = build("mmc4", folder)
    ((parts, meta),) = read_all(dataset).values()
    assert (meta["txt"], set(parts)) == ("One.\n<image>\nTwo.", {"0.jpg"})
    assert meta["url"] == "https://site.org"
    assert len(report.quarantined) == 2
    (tmp_path / "again").mkdir()
    strict = folder.rename(tmp_path / "again" / "in")
    with pytest.raises(Exception, match=r"missing file: gone\.jpg"):
        build("mmc4", strict, missing="fail")


@pytest.mark.parametrize("source", ["finevision", "llava-onevision", "obelics", "mmc4"])
def test_a_picture_cut_short_costs_its_sample_alone(tmp_path: Path, source: str) -> None:
    """The second of two pictures, in each source of tables and documents."""
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    files = {"a.jpg": picture(0), "b.jpg": picture(1), "cut.jpg": picture(2)[:300]}
    rows: list[Any] = []
    for number, names in enumerate((["a.jpg", "b.jpg"], ["a.jpg", "cut.jpg"])):
        held = [{"bytes": files[name], "path": name} for name in names]
        info = [{"image_name": name, "matched_text_index": i} for i, name in enumerate(names)]
        rows.append(
            {
                "finevision": {
                    "images": held,
                    "texts": [{"user": "which", "assistant": "none"}],
                },
                "llava-onevision": {
                    "id": str(number),
                    "image": held,
                    "conversations": talk("<image> or <image>"),
                },
                "obelics": {
                    "images": [*(f"https://x.org/{name}" for name in names), None],
                    "texts": [None, None, "end"],
                },
                "mmc4": {"text_list": ["one", "two"], "image_info": info},
            }[source]
        )
    if source in ("obelics", "mmc4"):
        for name, data in files.items():
            (folder / "images" / name).write_bytes(data)
        (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_parquet(folder / "t.parquet", rows)
    options = {
        "finevision": {"several": "list"},
        "llava-onevision": {"several": "list"},
        "obelics": {"names": "last"},
        "mmc4": {},
    }
    dataset, report = build(source, folder, **options[source])
    (reason,) = (found.reason for found in report.quarantined)
    assert "unreadable image" in reason
    ((parts, meta),) = read_all(dataset).values()
    assert parts == {"0.jpg": files["a.jpg"], "1.jpg": files["b.jpg"]}
    assert meta["media"] == ["image", "image"]
