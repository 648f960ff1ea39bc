"""Source ego4d-imu: Ego4D's csv and imu2clip's npy, cut by windows or around narrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_worlds import all_bytes, write_tree
from source_checks import (
    build_source,
    decode_sample,
    get_reasons,
    make_npy,
    make_turns,
    read_samples,
    to_json,
)

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.modalities.transforms.resample import resample
from onellm_dist.shards.sources.ego4d_imu import clean_narration

HEADER = (
    "component_idx,component_timestamp_ms,canonical_timestamp_ms,"
    "gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z\n"
)


def motion(seconds: float, rate: float = 200.0) -> tuple[np.ndarray, np.ndarray]:
    """(signal [6, N], accelerometer first; times [N] in ms)."""
    times = np.arange(int(seconds * rate)) * 1000 / rate
    t = times / 1000
    return np.stack([np.sin((i + 1) * t) + i for i in range(6)]), times


def raw_csv(seconds: float, rate: float = 198.4, before: int = 30) -> str:
    """Ego4D's table; the first rows lie before the video and have no canonical time."""
    signal, times = motion(seconds, rate)
    rows = [
        f"0,{i * 5}.0,,0.1,0.2,0.3,9.0,9.0,9.0\n"
        if i % 2
        else f"0,{i * 5}.0,NULL,0.1,0.2,0.3,9.0,9.0,9.0\n"
        for i in range(before)
    ]
    for column, t in zip(signal.T, times, strict=True):
        accelerometer, gyroscope = column[:3], column[3:]
        cells = ",".join(f"{v:.9f}" for v in (*gyroscope, *accelerometer))
        rows.append(f"0,{t + before * 5:.6f},{t:.6f},{cells}\n")
    return HEADER + "".join(rows)


def recordings(root: Path) -> Path:
    signal, times = motion(12)
    gap = (times < 5000) | (times > 5990 + 3000)
    return write_tree(
        root,
        {
            "v2/imu/aaaa.csv": raw_csv(10),
            "v2/processed_imu/bbbb.npy": make_npy(signal),
            "v2/processed_imu/bbbb_timestamps.npy": make_npy(times),
            "v2/processed_imu/cccc.npy": make_npy(signal[:, gap]),
            "v2/processed_imu/cccc_timestamps.npy": make_npy(times[gap]),
            "v2/processed_imu/dddd.npy": make_npy(np.array(["a"] * 6)),
            "v2/processed_imu/dddd_timestamps.npy": make_npy(times),
        },
    )


def window(uid: Any, start: float, text: Any, end: float | None = None) -> dict[str, Any]:
    return {
        "video_uid": uid,
        "window_start": start,
        "window_end": start + 2 if end is None else end,
        "text": text,
    }


def test_a_list_of_windows(tmp_path: Path) -> None:
    """Both forms of recording give what the modality makes of the recording itself."""
    inputs = recordings(tmp_path / "in")
    rows = [
        window("bbbb", 3.0, "#C C washes #unsure"),
        window("aaaa", 1.5, "C walks"),
        window("bbbb", 0.0, ["one", "another"]),
    ]
    (inputs / "window_idx_train.json").write_text(to_json(rows))
    report, dataset = build_source("ego4d-imu", inputs, tmp_path / "out")
    found = read_samples(dataset)
    assert (dataset.modalities, report.quarantined) == (("imu",), ())
    assert list(found) == ["window-0000001", "window-0000000", "window-0000002"]  # by video
    assert [s.get("txt") for s in found.values()] == ["C walks", "washes something", None]
    assert found["window-0000002"]["json"]["caption"] == ["one", "another"]
    assert found["window-0000000"]["json"] == {
        "video_uid": "bbbb",
        "window_start": 3.0,
        "window_end": 5.0,
        "conversations": make_turns("Describe the motion.", "washes something"),
    }
    signal, _ = motion(12)
    values = decode_sample(dataset, "window-0000000")["imu"].numpy()
    assert np.array_equal(
        values, signal[:, 600:1000].astype(np.float32)
    )  # accelerometer first, as stored
    raw, _ = motion(10, 198.4)
    expected = resample(raw[:, 298:695], 198, 200)[
        :, :400
    ]  # 1.5 s to 3.5 s; the rate is cut to a whole number, as in the reference
    values = decode_sample(dataset, "window-0000001")["imu"].numpy()
    assert np.abs(values - expected).max() < 1e-5
    middle = slice(20, 380)
    assert np.abs(values[:, middle] - motion(10)[0][:, 300:700][:, middle]).max() < 0.1


def test_bad_windows_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    inputs = recordings(tmp_path / "in")
    rows: list[Any] = [
        window("bbbb", 1, "good"),
        window("zzzz", 1, "no such video"),
        window("bbbb", 11.5, "beyond"),
        window("bbbb", 1, "long", 4.0),
        window("cccc", 6.0, "in a gap"),
        window("dddd", 1, "text as numbers"),
        window("bbbb", 2, "#C"),
        {"video_uid": "bbbb"},
        "row",
        window("bbbb", 2, 17),
        window("cccc", 4.0, "good half"),
    ]
    (inputs / "w.json").write_text(to_json(rows))
    report, dataset = build_source(
        "ego4d-imu", inputs, tmp_path / "out", windows="w.json", max_failures=0.9
    )
    assert {s["txt"] for s in read_samples(dataset).values()} == {"good", "good half"}
    why = {int(k.split("-")[1]): r for k, r in get_reasons(report).items()}
    starts = {
        1: "missing file: no recording of video zzzz",
        2: "no usable window: the window 11.5 to 13.5 s reaches beyond",
        3: "no usable window: the window 1 to 4 s is not 2 s long",
        4: "no usable window: the window 6 to 8 s has 0 samples",
        5: "unreadable recording: dddd.npy: .imu.npy",
        6: "empty caption",
        7: "unreadable row",
        8: "unreadable row",
        9: "caption is not text: a int",
    }
    assert why.keys() == starts.keys()
    assert {n: r for n, r in why.items() if not r.startswith(starts[n])} == {}
    again, _ = build_source(
        "ego4d-imu",
        inputs,
        tmp_path / "strict",
        windows="w.json",
        max_failures=0.95,
        min_samples=300,
    )
    assert any(
        r.startswith("too few samples: the window 4 to 6 s has 200")
        for r in get_reasons(again).values()
    )
    with pytest.raises(OneLLMError, match="bad samples: "):
        build_source("ego4d-imu", inputs, tmp_path / "none", windows="w.json")


def narration(second: float, text: str) -> dict[str, Any]:
    return {
        "timestamp_sec": second,
        "timestamp_frame": int(30 * second),
        "narration_text": text,
        "annotation_uid": f"u{second}",
    }


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "videos"])
def test_windows_made_of_narrations(tmp_path: Path, wrapped: bool) -> None:
    inputs = recordings(tmp_path / "in")
    narrations_of_video = {
        "aaaa": {
            "narration_pass_1": {
                "narrations": [
                    narration(0.4, "#C C opens a door"),
                    narration(5.0, "#O a man X sits"),
                    narration(6.0, "#Unsure"),
                ],
                "summaries": [{"start_sec": 0, "end_sec": 10, "summary_text": "#Summary C walks"}],
            },
            "narration_pass_2": {
                "narrations": [narration(3.25, "#C C lifts #unsure é"), {"timestamp_sec": 1.0}],
                "summaries": [],
            },
        },
        "none": {"narration_pass_1": {"narrations": [narration(1.0, "#C C waits")]}},
        "empty": {"status": "redacted"},
        "bbbb": {"narration_pass_1": {"narrations": [narration(11.9, "#C C stops")]}},
    }
    text = json.dumps(
        {"videos": narrations_of_video, "version": "1"} if wrapped else narrations_of_video,
        ensure_ascii=False,
        indent=1,
    )
    (inputs / "narration.json").write_text(text, encoding="utf-8")
    report, dataset = build_source("ego4d-imu", inputs, tmp_path / "out", max_failures=0.5)
    found = read_samples(dataset)
    assert {
        k: (s["txt"], s["json"]["window_start"], s["json"]["window_end"]) for k, s in found.items()
    } == {
        "aaaa-1-00000": ("opens a door", 0.0, 2.0),  # not before the video
        "aaaa-1-00001": ("a man X sits", 4.0, 6.0),
        "aaaa-1-00002": ("something", 5.0, 7.0),
        "aaaa-2-00000": ("lifts something é", 2.25, 4.25),
    }
    assert decode_sample(dataset, "aaaa-2-00000")["imu"].abs().max() > 0.5
    why = get_reasons(report)
    assert why["aaaa-2-00001"].startswith("unreadable row")
    assert why["bbbb-1-00000"].startswith(
        "no usable window: the window 10.9 to 12.9 s reaches beyond the recording's end"
    )
    assert json.loads((tmp_path / "out/statistics.json").read_text())["left_out"] == {
        "a video without inertial recording": 1,
        "a video without narrations": 1,
    }
    own, dataset = build_source(
        "ego4d-imu", inputs, tmp_path / "own", others=False, passes="1", max_failures=0.9
    )
    assert set(read_samples(dataset)) == {"aaaa-1-00000", "aaaa-1-00002"}
    assert len(own.quarantined) == 1


@pytest.mark.slow
def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    inputs = recordings(tmp_path / "in")
    narrations_of_video = [narration(0.5 * i, f"#C C step {i}") for i in range(1, 17)]
    (inputs / "narration.json").write_text(
        to_json(
            {
                uid: {"narration_pass_1": {"narrations": narrations_of_video}}
                for uid in ("aaaa", "bbbb", "cccc")
            }
        )
    )
    for name, workers in (("one", 1), ("two", 2)):
        build_source(
            "ego4d-imu",
            inputs,
            tmp_path / name,
            workers=workers,
            max_samples=8,
            max_failures=0.5,
            name="n",
        )
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


def test_lists_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    inputs = recordings(tmp_path / "in")
    with pytest.raises(UsageError, match=r"neither window_idx_train.json nor narration.json"):
        build_source("ego4d-imu", inputs, tmp_path / "out")
    (inputs / "narration.json").write_text(
        to_json({"aaaa": {"narration_pass_1": {"narrations": [narration(1, "x")]}}})[:-20]
    )
    with pytest.raises(OneLLMError, match=r"narration.json: at byte \d+"):
        build_source("ego4d-imu", inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="passes=3"):
        build_source("ego4d-imu", inputs, tmp_path / "out", passes="3")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("#C C picks a #unsure", "picks a something"),
        ("#C takes it", "takes it"),
        ("#c c Cuts", "Cuts"),
        ("#O man Y runs", "man Y runs"),
        ("C walks", "C walks"),
        ("#C C", ""),
        ("#C Cuts an onion", "Cuts an onion"),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_narration(raw) == clean
