"""Logs, scans and soundtracks in the modalities' forms: units, rates, windows."""

from __future__ import annotations

import gzip
import io
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from onellm_dist.testing.integration import signals


def read_columns(csv: bytes) -> dict[str, np.ndarray]:
    head, *rows = csv.decode().splitlines()
    table = np.array([row.split(",") for row in rows], float)
    return dict(zip(head.split(","), table.T, strict=True))


def test_an_xsens_window_keeps_units_and_starts_at_its_second() -> None:
    rows = [f"{n} {n} 0 9.8 {n / 100} 0 0 1 1 1" for n in range(300)]
    head = ["// Start Time: 0", "// Sample rate: 120.0Hz", "// Firmware Version: 2.5.1"]
    names = "Counter\tAcc_X\tAcc_Y\tAcc_Z\tGyr_X\tGyr_Y\tGyr_Z\tMag_X\tMag_Y\tMag_Z"
    found = read_columns(
        signals.cut_xsens_window("\n".join([*head, names, *rows]).encode(), start=0.5, seconds=2.0)
    )
    assert found["accl_x"].tolist() == list(range(60, 300))
    np.testing.assert_allclose(found["gyro_x"], np.arange(60, 300) / 100)
    np.testing.assert_allclose(
        found["component_timestamp_ms"][1:3], [1000 / 120, 2000 / 120], atol=1e-3
    )
    with pytest.raises(ValueError, match=r"2\.5 s"):
        signals.cut_xsens_window("\n".join([*head, names, *rows]).encode(), start=1.0, seconds=2.0)


def test_an_ximu_window_is_converted_to_si_units() -> None:
    row = "7,180,0,-90,1,0,-2,0,0,0"
    log = "\n".join(["Packet number,Gyroscope X (deg/s)", *[row] * 512]).encode()
    found = read_columns(signals.cut_ximu_window(log, 256.0, 0.0, 2.0))
    assert len(found["gyro_x"]) == 512
    np.testing.assert_allclose(
        [found[f"gyro_{a}"][0] for a in "xyz"], [np.pi, 0, -np.pi / 2], rtol=1e-6
    )
    np.testing.assert_allclose(
        [found[f"accl_{a}"][0] for a in "xyz"], [9.80665, 0, -19.6133], rtol=1e-6
    )


def encode_mgz(values: np.ndarray, dtype: int = 3) -> bytes:
    """[vertices, frames] as FreeSurfer writes it."""
    head = (
        np.array([1, values.shape[0], 1, 1, values.shape[1], dtype], ">i4")
        .tobytes()
        .ljust(284, b"\0")
    )
    return gzip.compress(head + values.T.astype(">f4").tobytes())


def test_mgz_is_read_by_vertex_and_frame() -> None:
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_array_equal(signals.read_mgz(encode_mgz(values)), values)
    with pytest.raises(ValueError, match="float32"):
        signals.read_mgz(encode_mgz(values, dtype=0))


def test_the_bold_vector_leaves_silent_vertices_out_and_is_z_scored_over_the_scan() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.normal(3, 2, size=(40, 30)), rng.normal(-1, 5, size=(40, 30))
    left[::4] = 0
    found = signals.make_bold_vector([left, right], voxels=50, frame=4)
    assert found.shape == (3, 50) and found.dtype == np.float32
    alive = np.concatenate([left[left.std(1) > 0], right])[:50]
    np.testing.assert_allclose(
        found,
        ((alive - alive.mean(1, keepdims=True)) / alive.std(1, keepdims=True))[:, 4:7].T,
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match="70 vertices"):
        signals.make_bold_vector([left, right], voxels=71, frame=0)
    with pytest.raises(ValueError, match="30 frames"):
        signals.make_bold_vector([left, right], voxels=50, frame=28)


def make_movie(sound: np.ndarray | None, rate: int = 48000) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        picture = container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 32
        track = container.add_stream("aac", rate=rate, layout="mono") if sound is not None else None
        for n in range(10):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 32, 3), n * 20, np.uint8), format="rgb24"
            )
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        if track is not None and sound is not None:
            frame_ = av.AudioFrame.from_ndarray(
                sound[None].astype(np.float32), format="fltp", layout="mono"
            )
            frame_.sample_rate, frame_.time_base, frame_.pts = rate, Fraction(1, rate), 0
            container.mux(track.encode(frame_))
            container.mux(track.encode())
    return buffer.getvalue()


def test_a_soundtrack_is_cut_at_its_seconds() -> None:
    seconds = np.arange(48000) / 48000
    tone = np.where(seconds < 0.5, 0.0, 0.5 * np.sin(2 * np.pi * 440 * seconds))
    video = make_movie(tone)
    quiet, rate = soundfile.read(io.BytesIO(signals.cut_soundtrack(video, 0.0, 0.4)))
    loud, _ = soundfile.read(io.BytesIO(signals.cut_soundtrack(video, 0.6, 0.3)))
    assert rate == 48000 and quiet.shape == (19200,) and loud.shape == (14400,)
    assert np.abs(quiet).max() < 0.05 and np.sqrt((loud**2).mean()) > 0.3
    with pytest.raises(ValueError, match="no audio stream"):
        signals.cut_soundtrack(make_movie(None), 0.0, 1.0)
    with pytest.raises(ValueError, match="ends before"):
        signals.cut_soundtrack(video, 5.0, 1.0)
