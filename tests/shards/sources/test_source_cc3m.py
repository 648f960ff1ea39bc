"""Sources cc3m-depth and cc3m-normal: parallel trees, Omnidata, tars, tables."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from cc3m_worlds import colour_map, grey_map, img2dataset_tar, parallel
from PIL import Image
from shard_worlds import all_bytes, write_tree
from source_checks import build_source, decode_sample, get_reasons, make_photo, read_samples

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.workers import ArrayTask


@pytest.mark.parametrize("kind", ["depth", "normal"])
def test_parallel_trees(tmp_path: Path, kind: str) -> None:
    inputs = parallel(tmp_path / "in", kind)
    report, dataset = build_source(f"cc3m-{kind}", inputs, tmp_path / "out")
    found = read_samples(dataset)
    assert not report.quarantined
    assert dataset.modalities == (kind,)
    assert list(found) == [*(f"00000/00000000{i}" for i in range(5)), "00001/000010000"]
    assert found["00000/000000000"] == {
        "jpg": make_photo(seed=0),
        f"{kind}.png": grey_map(),
        "txt": "caption 0",
    }
    assert found["00000/000000001"][f"{kind}.jpg"] == grey_map(kind="JPEG")
    assert found["00001/000010000"]["txt"] == "upright"
    picture, rendered = decode_sample(dataset, "00000/000000000")[kind]
    assert rendered[0, 112, 200] > rendered[0, 112, 20]  # brighter to the right, as the map
    assert not picture.equal(rendered)


def turned_photo() -> bytes:
    """A square that the camera noted as turned (EXIF 6)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make_photo((64, 64)))).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("stated", ["stored", "upright"])
def test_maps_of_turned_squares_and_of_distances(tmp_path: Path, stated: str) -> None:
    """Parallel trees and Omnidata's squares: one option says it of both, and the .json keeps it."""
    far = np.tile(np.linspace(1000, 60000, 64).astype(np.uint16), (64, 1))
    buffer = io.BytesIO()
    Image.fromarray(far).save(buffer, "PNG")
    files: dict[str, bytes | str] = {
        "cc3m/a.jpg": turned_photo(),
        "cc3m/a.txt": "x",
        "cc3m_depth/a.png": buffer.getvalue(),
        "cc3m/b.jpg": turned_photo(),
        "cc3m/b.txt": "y",
        "cc3m_depth/b_depth.png": buffer.getvalue(),
    }
    inputs = write_tree(tmp_path / "in", files)
    report, dataset = build_source(
        "cc3m-depth",
        inputs,
        tmp_path / "out",
        map_orientation=stated,
        depth_is_distance=True,
        max_failures=0.5,
    )
    assert not report.quarantined
    for key, sample in read_samples(dataset).items():
        assert sample["json"] == {"map_orientation": stated, "depth_is_distance": True}
        shown = decode_sample(dataset, key)["depth"][1, 0]
        shown = shown if stated == "upright" else torch.rot90(shown, 1)
        assert shown[112, 20] > shown[112, 200]  # near is bright, on the left of what was stored
    with pytest.raises(OneLLMError, match="bad samples: "):
        build_source("cc3m-depth", inputs, tmp_path / "no")
    for options, words in (
        ({"map_orientation": "sideways"}, "none of stored, upright"),
        ({"describe": "map_orientation=stored"}, "decides on map_orientation"),
    ):
        with pytest.raises(UsageError, match=words):
            build_source("cc3m-depth", inputs, tmp_path / "no", **options)


def test_bad_pairs_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    inputs = parallel(tmp_path / "in", "depth")
    (inputs / "cc3m_depth/00000/000000000.png").unlink()
    (inputs / "cc3m/00000/000000001.txt").unlink()
    (inputs / "cc3m/00000/000000002.txt").write_text(" \n")
    (inputs / "cc3m/00000/000000003.jpg").write_bytes(make_photo(seed=3)[:300])
    (inputs / "cc3m/00000/notes.pdf").write_bytes(b"no picture")
    report, dataset = build_source("cc3m-depth", inputs, tmp_path / "out", max_failures=0.7)
    why = get_reasons(report)
    assert list(read_samples(dataset)) == ["00000/000000004", "00001/000010000"]
    assert why["00000/000000000"].startswith("missing map: no depth map of 00000/000000000.jpg in ")
    assert why["00000/000000001"].startswith("missing file: ")
    assert why["00000/000000002"].startswith("empty caption")
    assert why["00000/000000003"].startswith(
        "unreadable depth: .jpg (300 bytes) is not a readable JPEG"
    )
    assert len(why) == 4
    with pytest.raises(
        OneLLMError, match=r"bad samples: 1 of the first 1; max_failures=0\.1 allows 0 of all 6"
    ):
        build_source("cc3m-depth", inputs, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_pictures_that_come_or_go_after_the_plan_move_no_others(tmp_path: Path) -> None:
    inputs = parallel(tmp_path / "in", "depth")
    build_source("cc3m-depth", inputs, tmp_path / "whole", name="same", max_samples=2)
    build_dataset(
        "cc3m-depth",
        inputs,
        tmp_path / "out",
        options={"name": "same", "max_samples": 2},
        task=ArrayTask(0, 2),
    )  # the first and the last shard
    for new in ("cc3m/00000/0.jpg", "cc3m/00000/000000002b.jpg"):
        (inputs / new).write_bytes(make_photo())
    build_source("cc3m-depth", inputs, tmp_path / "out", name="same", max_samples=2)
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_omnidatas_squares_go_with_the_middle_of_their_pictures(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "images/a.jpg": make_photo((96, 48), 1),
        "images/a.txt": "wide",
        "images/b.jpg": make_photo((48, 64), 2),
        "images/b.txt": "with rgb",
        "out/a_normal.png": colour_map(),
        "out/b_normal.png": colour_map(),
        "out/b_rgb.png": make_photo((384, 384), 2, "PNG"),
    }
    inputs = write_tree(tmp_path / "in", files)
    report, dataset = build_source(
        "cc3m-normal", inputs, tmp_path / "normal", images="images", maps="out"
    )
    found = read_samples(dataset)
    assert not report.quarantined
    assert set(found["a"]) == {"jpg", "normal.png", "txt"}
    square = Image.open(io.BytesIO(found["a"]["jpg"]))
    assert square.size == (48, 48)
    expected = np.asarray(Image.open(tmp_path / "in/images/a.jpg").crop((24, 0, 72, 48))).astype(
        int
    )
    assert np.abs(np.asarray(square).astype(int) - expected).mean() < 3
    assert found["b"]["png"] == files["out/b_rgb.png"]
    assert decode_sample(dataset, "b")["normal"][1, 2].std() < 1e-6  # the map's blue is one value

    both = write_tree(
        tmp_path / "one",
        {
            "x.jpg": make_photo(),
            "x.txt": "beside",
            "x_depth.png": colour_map(512),
            "x_normal.png": colour_map(),
        },
    )
    assert list(read_samples(build_source("cc3m-depth", both, tmp_path / "depth")[1])["x"]) == [
        "depth.png",
        "jpg",
        "txt",
    ]


def test_maps_below_the_pictures_folder_are_no_pictures(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.jpg": make_photo(),
        "a.txt": "one",
        "maps/a.jpg": grey_map(kind="JPEG"),
        "cc3m_normal/a.jpg": grey_map(kind="JPEG"),
    }
    inputs = write_tree(tmp_path / "cc3m_depth_pictures", files)
    report, dataset = build_source("cc3m-depth", inputs, tmp_path / "out", maps="maps")
    assert not report.quarantined
    assert {k: s["depth.jpg"] for k, s in read_samples(dataset).items()} == {
        "a": grey_map(kind="JPEG")
    }


def test_the_references_table(tmp_path: Path) -> None:
    """cc3m.csv: tab-separated, caption and url, local paths with /cc3m/ in them."""
    inputs = parallel(tmp_path / "in", "depth")
    rows = [
        "url\tcaption",
        '/mnt/x/cc3m/00000/000000002.jpg\tof the "table"',
        "cc3m/00000/000000004.jpg\tsecond",
        "one cell",
        "00000/none.jpg\tno such picture",
        f"{inputs}/cc3m/00001/000010000.JPG\tabsolute",
    ]
    (inputs / "cc3m.csv").write_text("\n".join(rows) + "\n")
    report, dataset = build_source(
        "cc3m-depth", inputs, tmp_path / "out", captions="cc3m.csv", max_failures=0.5
    )
    assert {k: s["txt"] for k, s in read_samples(dataset).items()} == {
        "00000/000000002": 'of the "table"',
        "00000/000000004": "second",
        "00001/000010000": "absolute",
    }
    assert [q.reason.split(":")[0] for q in report.quarantined] == ["unreadable row", "missing map"]
    assert [q.file for q in report.quarantined] == ["cc3m.csv:4", "cc3m.csv:5"]
    (inputs / "google.tsv").write_text("a caption\thttp://x/1.jpg\n")
    with pytest.raises(UsageError, match="img2dataset"):
        build_source("cc3m-depth", inputs, tmp_path / "no", captions="google.tsv")


def test_a_half_written_tar(tmp_path: Path) -> None:
    files = {f"cc3m_depth/00000/00000{i:04d}.png": grey_map() for i in range(4)}
    inputs = write_tree(tmp_path / "in", files)
    (inputs / "cc3m").mkdir()
    img2dataset_tar(inputs / "cc3m", "00000", cut=10240, stats=False)
    with pytest.raises(UsageError, match="unfinished"):
        build_source("cc3m-depth", inputs, tmp_path / "out")
    report, dataset = build_source(
        "cc3m-depth", inputs, tmp_path / "out", unfinished="take", max_failures=0.6
    )
    assert read_samples(dataset)
    assert any("truncated" in r for r in get_reasons(report).values())
