"""Damaged media in a build: used and listed, or left out; faults cost the windows around them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from shard_worlds import write_tree
from source_checks import (
    build_source,
    decode_sample,
    get_reasons,
    make_npy,
    read_samples,
    to_json,
)

from onellm_dist.common.errors import OneLLMError
from onellm_dist.shards.tools.preview import build_page

RATE = 16000


def flac(seed: int) -> bytes:
    wave = np.random.default_rng(seed).normal(0, 0.1, 3 * RATE).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="FLAC")
    return buffer.getvalue()


def sounds(root: Path) -> Path:
    files: dict[str, bytes | str] = {}
    for number, kept in enumerate((1.0, 0.9, 0.85, 0.3, 1.0)):
        data = flac(number)
        files[f"{number}.flac"] = data[: int(kept * len(data))]
        files[f"{number}.txt"] = f"noise {number}"
    return write_tree(root, files)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_damaged_sounds_are_used_and_listed(tmp_path: Path, workers: int) -> None:
    inputs = sounds(tmp_path / "in")
    report, dataset = build_source(
        "folder", inputs, tmp_path / "out", max_failures=0.3, max_samples=2, workers=workers
    )
    assert set(read_samples(dataset)) == {"0", "1", "2", "4"}
    assert list(get_reasons(report)) == ["3"] and "lost" in get_reasons(report)["3"]
    listed = [json.loads(s) for s in (tmp_path / "out/damaged.jsonl").read_text().splitlines()]
    assert [(d["key"], d["file"]) for d in listed] == [
        (key, str(inputs / f"{key}.flac")) for key in ("1", "2")
    ]
    assert all(".flac: 0." in d["damage"] and "of 3.000 s" in d["damage"] for d in listed)
    assert json.loads((tmp_path / "out/statistics.json").read_text())["damaged"] == 2
    assert any("damaged, but used: 2 samples" in note for note in report.notes)
    value = decode_sample(dataset, "1")["audio"]
    assert 250 < int((value[0] != value[0, 0, -1]).any(0).sum()) < 298  # frames of 10 ms
    page = build_page(tmp_path / "out", previews=1)
    assert "2 are used although some of their media is missing" in page


def test_a_build_without_damage_has_no_list(tmp_path: Path) -> None:
    inputs = write_tree(tmp_path / "in", {"a.flac": flac(0), "a.txt": "noise"})
    report, _ = build_source("folder", inputs, tmp_path / "out")
    assert report.notes == () and not (tmp_path / "out/damaged.jsonl").exists()
    assert json.loads((tmp_path / "out/statistics.json").read_text())["damaged"] == 0


def csv_of(times: np.ndarray, signal: np.ndarray, *, empty: int | None = None) -> str:
    lines = ["canonical_timestamp_ms,gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z"]
    for number, (time, row) in enumerate(zip(times, signal.T, strict=True)):
        cells = [f"{v:.6f}" for v in (*row[3:], *row[:3])]
        if number == empty:
            cells[:3] = ["", "", ""]
        lines.append(f"{time},{','.join(cells)}")
    return "\n".join(lines) + "\n"


def test_a_fault_of_an_ego4d_recording_costs_the_windows_around_it(tmp_path: Path) -> None:
    times = np.arange(4000) * 5.0  # 20 s
    signal = np.stack([np.sin((i + 1) * times / 1000) + i for i in range(6)])
    back, doubled = times.copy(), times.copy()
    back[2000:] -= 12.0
    doubled[2000] = doubled[1999]
    holes = signal.copy()
    holes[2, 2000] = np.nan
    files: dict[str, bytes | str] = {
        "v2/imu/good.csv": csv_of(times, signal),
        "v2/imu/back.csv": csv_of(back, signal),
        "v2/imu/hole.csv": csv_of(times, signal, empty=2000),
        "v2/imu/double.csv": csv_of(doubled, signal),
        "imu/nan.npy": make_npy(holes),
        "imu/nan_timestamps.npy": make_npy(times),
    }
    windows: list[dict[str, Any]] = [
        {"video_uid": uid, "window_start": s, "window_end": s + 2.0, "text": f"{uid} at {s}"}
        for uid in ("good", "back", "hole", "double", "nan")
        for s in (0.5, 4.5, 8.5, 9.5, 11.5, 15.5)
    ]
    inputs = write_tree(tmp_path / "in", files)
    (inputs / "window_idx_train.json").write_text(to_json(windows))
    report, dataset = build_source("ego4d-imu", inputs, tmp_path / "out", max_failures=0.5)
    texts = {s["txt"] for s in read_samples(dataset).values()}
    left_out = {w["text"] for w in windows} - texts
    assert left_out == {f"{u} at {s}" for u in ("back", "hole", "nan") for s in (8.5, 9.5)}
    why = " ".join(get_reasons(report).values())
    assert "runs backwards" in why and "gyro_x is empty" in why and "z is not finite" in why


def test_units_of_a_table_reach_training(tmp_path: Path) -> None:
    """Columns that the table of captions has beside its own are the sample's json."""
    at = np.arange(400) / 200
    signal = np.stack([0 * at, 0 * at, 1 + 0 * at, 90 * np.sin(at), 0 * at, 0 * at])
    rows = "file,caption,accel_unit,gyro_unit\na.imu.npy,a turn,g,deg/s\n"
    inputs = write_tree(tmp_path / "in", {"a.imu.npy": make_npy(signal), "captions.csv": rows})
    _, dataset = build_source("folder", inputs, tmp_path / "out", modality="imu")
    value = next(iter(decode_sample(dataset, "a").values()))
    np.testing.assert_allclose(value[2], 9.80665, rtol=1e-6)
    np.testing.assert_allclose(value[3], np.deg2rad(90 * np.sin(at)), atol=1e-5)


def test_seconds_under_a_name_of_milliseconds_are_a_bad_sample(tmp_path: Path) -> None:
    lines = ["timestamp_ms,ax,ay,az,gx,gy,gz"]
    lines += [f"{i / 100},0.1,0.2,9.8,0.1,0.2,0.3" for i in range(600)]
    inputs = write_tree(tmp_path / "in", {"a.csv": "\n".join(lines), "a.txt": "a walk"})
    with pytest.raises(OneLLMError, match=r"stated in ms, which .* in s it would be 100"):
        build_source("folder", inputs, tmp_path / "out", modality="imu")
