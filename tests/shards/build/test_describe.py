"""What no file says of its media, said for a whole build by `describe` or a source's option."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from instruct_trees import instruction_tuning
from PIL import Image
from shard_worlds import write_tree
from source_checks import build_source, decode_sample, get_reasons, make_npy, read_samples

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.modalities.files import read_file_value
from onellm_dist.shards.build.task import TooManyFailuresError
from onellm_dist.shards.tools.preview_samples import render_samples

G = 9.80665


def photograph(orientation: int) -> bytes:
    """A square: red on the left of what is stored, darker at its bottom."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32, 0], pixels[:, 32:, 2] = 250, 250
    pixels[32:] //= 2
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def stored_pixels(data: bytes) -> bytes:
    """The same without its orientation: a map of the stored pixels."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "PNG", exif=b"")
    return buffer.getvalue()


def test_maps_of_square_pictures_that_are_turned(tmp_path: Path) -> None:
    """The refusal names the way out, and every door reads the same then."""
    data = photograph(6)
    files: dict[str, bytes | str] = {
        "a.png": data,
        "a.depth.png": stored_pixels(data),
        "a.txt": "x",
    }
    inputs = write_tree(tmp_path / "in", files)
    with pytest.raises(OneLLMError, match="cannot be known whether the map is turned"):
        build_source("folder", inputs, tmp_path / "out")
    report, dataset = build_source(
        "folder", inputs, tmp_path / "out", describe="map_orientation=stored"
    )
    assert report.failures == 0
    assert read_samples(dataset)["a"]["json"] == {"map_orientation": "stored"}
    trained = decode_sample(dataset, "a")["depth"]
    assert torch.equal(trained[0], trained[1])  # the map shows what the picture shows
    [shard] = dataset.shards("train")
    assert "cannot be drawn" not in render_samples(dataset, [(shard, 0)])
    (inputs / "a.json").write_text('{"map_orientation": "stored"}')
    assert torch.equal(read_file_value(get_modality("depth"), inputs / "a.depth.png"), trained)
    (inputs / "a.json").write_text('{"map_orientation": "upright"}')
    _, dataset = build_source(  # what a sample says itself goes first
        "folder", inputs, tmp_path / "own", describe="map_orientation=stored"
    )
    shown = decode_sample(dataset, "a")["depth"]
    assert not torch.equal(shown[0], shown[1])
    assert torch.equal(read_file_value(get_modality("depth"), inputs / "a.depth.png"), shown)


def recording(seconds: float, accelerometer: float, time: float) -> str:
    """A still sensor that turns, as a table without units."""
    at = np.arange(int(100 * seconds)) / 100
    rows = [
        f"{t * time},{0.01 * accelerometer},0.0,{G * accelerometer},0.1,{np.sin(t)},0.2" for t in at
    ]
    return "\n".join(["time,ax,ay,az,gx,gy,gz", *rows])


def test_units_of_inertial_recordings(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.csv": recording(2.0, 1 / G, 1.0),
        "a.txt": "a turn",
        "b.csv": recording(2.0, 1.0, 1000.0),
        "b.txt": "a turn",
        "b.json": '{"accel_unit": "m/s^2", "time_unit": "ms"}',
    }
    inputs = write_tree(tmp_path / "in", files)
    options: dict[str, Any] = {"modality": "imu", "max_failures": 0.9}
    with pytest.raises(TooManyFailuresError, match="gravity in g and not in m/s"):
        build_source("folder", inputs, tmp_path / "none", **{**options, "max_failures": 0.1})
    report, dataset = build_source(
        "folder", inputs, tmp_path / "out", describe="accel_unit=g, time_unit=s", **options
    )
    assert report.failures == 0
    first, second = (decode_sample(dataset, key)["imu"] for key in "ab")
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    report, _ = build_source(
        "folder", inputs, tmp_path / "mg", describe="accel_unit=mg,time_unit=s", **options
    )
    assert "gravity in g and not in mg" in get_reasons(report)["a"]


@pytest.mark.parametrize(
    ("describe", "words"),
    [
        ("accel_unit=furlong", "accel_unit: the unit 'furlong' of the accelerometer is not known"),
        ("accel_unit", "'accel_unit' has no ="),
        ("depth_is_distance=true", "'depth_is_distance' is none of its keys"),
        ("accel_unit=g,accel_unit=mg", "'accel_unit' is given twice"),
        ("", "has no ="),
    ],
)
def test_impossible_descriptions_are_refused_before_anything_is_read(
    describe: str, words: str, tmp_path: Path
) -> None:
    inputs = write_tree(tmp_path / "in", {"a.csv": recording(2.0, 1.0, 1.0), "a.txt": "x"})
    with pytest.raises(UsageError) as error:
        build_source("folder", inputs, tmp_path / "out", modality="imu", describe=describe)
    assert words in error.value.what
    assert not (tmp_path / "out").exists()


def test_ego4ds_recordings_in_other_units(tmp_path: Path) -> None:
    """The source stores m/s^2 and rad/s: it converts itself, and `describe` is refused."""
    at = np.arange(1000) / 200
    signal = np.stack([0.01 * np.ones_like(at), 0 * at, 1 + 0 * at, *[np.sin(at)] * 3])
    windows = [{"video_uid": "u", "window_start": 1.0, "window_end": 3.0, "text": "a turn"}]
    files: dict[str, bytes | str] = {
        "window_idx_train.json": json.dumps(windows),
        "u.npy": make_npy(signal),
        "u_timestamps.npy": make_npy(at * 1000),
    }
    inputs = write_tree(tmp_path / "in", files)
    _, dataset = build_source("ego4d-imu", inputs, tmp_path / "out", imu_units="g,,")
    (key,) = read_samples(dataset)
    assert decode_sample(dataset, key)["imu"][2].mean().item() == pytest.approx(G, rel=1e-3)
    for options, words in (
        ({"describe": "accel_unit=g"}, "use -o imu_units"),
        ({"imu_units": "g"}, "imu_units=g,deg/s,ms"),
        ({"imu_units": "g,deg/s,furlong"}, "imu_units=g,deg/s,ms"),
    ):
        with pytest.raises(UsageError) as error:
            build_source("ego4d-imu", inputs, tmp_path / "no", **options)
        assert words in error.value.do
    with pytest.raises(TooManyFailuresError, match="gravity in g and not in mg"):
        build_source("ego4d-imu", inputs, tmp_path / "no", imu_units="mg,,")


def test_onellms_own_recordings_in_other_units(tmp_path: Path) -> None:
    """Its windows are cut and converted as Ego4D's are."""
    inputs = instruction_tuning(tmp_path / "in")
    windows: list[torch.Tensor] = []
    for units in (None, "g,deg/s,ms"):
        out = tmp_path / f"out-{len(windows)}"
        _, dataset = build_source("onellm-instruct", inputs, out, modality="imu", imu_units=units)
        (key,) = read_samples(dataset)
        windows.append(decode_sample(dataset, key)["imu"])
    factors = torch.tensor([[G]] * 3 + [[np.pi / 180]] * 3)
    torch.testing.assert_close(windows[1], windows[0] * factors, rtol=1e-5, atol=1e-6)
    for options, words in (
        ({"describe": "gyro_unit=deg/s"}, "use -o imu_units"),
        ({"imu_units": "g,deg/s,furlong"}, "imu_units=g,deg/s,ms"),
    ):
        with pytest.raises(UsageError) as error:
            build_source("onellm-instruct", inputs, tmp_path / "no", modality="imu", **options)
        assert words in error.value.do
