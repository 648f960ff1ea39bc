"""IMU windows and fMRI vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_samples import npy
from safetensors.torch import load_file

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.io.damage import collect_damage
from onellm_dist.modalities.io.imu_times import measure_gaps
from onellm_dist.modalities.limits import check_input

PARITY = load_file(Path(__file__).parents[1] / "fixtures/parity_preprocess/preprocess.safetensors")
IMU, FMRI = get_modality("imu"), get_modality("fmri")
RNG = np.random.default_rng(0)
WINDOW = {"window_start": 1.0, "window_end": 3.0}


def motion(samples: int, rate: float = 200.0) -> np.ndarray:
    at = np.arange(samples) / rate
    return np.stack([np.sin(2 * np.pi * (c + 1) * at) + c for c in range(6)])


def values(parts: dict[str, Part], meta: dict[str, Any] | None = None) -> torch.Tensor:
    return IMU.transform(IMU.decode(parts, meta or {}), train=True, rng=RNG)


def timed(signal: np.ndarray, times: np.ndarray) -> dict[str, Part]:
    return {"imu": npy(signal), "timestamps": npy(times, "timestamps.npy")}


def test_a_window_is_the_references() -> None:
    got = values(
        timed(PARITY["imu.signal_6xN"].numpy(), PARITY["imu.timestamps_ms"].numpy()), WINDOW
    )
    torch.testing.assert_close(got, PARITY["imu.win0"].float(), atol=0, rtol=0)


def test_a_ready_window_needs_nothing_else() -> None:
    signal = motion(400)
    got = values(
        {"imu": npy(signal)}, {"window_start": 512.0, "window_end": 514.0, "caption": "..."}
    )
    assert got.shape == (6, 400) and got.dtype == torch.float32
    np.testing.assert_array_equal(got, signal.astype(np.float32))


@pytest.mark.parametrize("samples", [10, 399, 401, 440])
def test_nearly_two_seconds_are_cut_or_filled(samples: int) -> None:
    got = values({"imu": npy(motion(samples))})
    np.testing.assert_array_equal(
        got[:, : min(samples, 400)], motion(samples)[:, :400].astype(np.float32)
    )
    assert (got[:, samples:] == 0).all()


@pytest.mark.parametrize("rate", [50, 100, 197, 400])
def test_other_rates_are_resampled(rate: int) -> None:
    times = np.arange(rate * 5) * 1000 / rate
    got = values(timed(motion(rate * 5, rate), times), WINDOW).numpy()
    at = 1 + np.arange(400) / 200
    middle = slice(60, 340)  # the window is zero outside itself: its edges ring
    for channel in range(6):
        expected = np.sin(2 * np.pi * (channel + 1) * at) + channel
        assert np.abs(got[channel, middle] - expected[middle]).max() < 0.05 * (channel + 1)


def test_the_window_is_half_open() -> None:
    signal = (np.arange(2000.0) / 128)[None].repeat(6, 0)
    got = values(timed(signal, np.arange(2000) * 5.0), WINDOW)
    assert got[0, 0] == 200 / 128 and got[0, -1] == 599 / 128


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"window_start": 1.0, "window_end": 3.6}, "2 s long"),
        ({"window_start": 1.0, "window_end": 1.0}, "2 s long"),
        ({"window_start": 9.0, "window_end": 11.0}, "beyond"),
        ({"window_start": 1.0}, "window_end"),
        ({"window_start": "1", "window_end": 3.0}, "window_start"),
        ({"window_start": True, "window_end": 3.0}, "window_start"),
        ({"window_start": float("nan"), "window_end": 3.0}, "window_start"),
        ({}, "no window"),
    ],
)
def test_bad_windows_are_refused(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        values(timed(motion(2000), np.arange(2000) * 5.0), meta)


def test_gaps_are_refused() -> None:
    times = np.concatenate([np.arange(100) * 5.0, 20_000 + np.arange(100) * 5.0])
    with pytest.raises(SampleError, match="away"):
        values(timed(motion(200), times), {"window_start": 8.0, "window_end": 10.0})
    with pytest.raises(SampleError, match="samples"):
        values(timed(motion(200), times), {"window_start": 17.5, "window_end": 19.5})


def window_with_gap(gap: float, at: float = 1.8, rate: float = 200.0) -> list[str]:
    """What is noted of a window of 1 to 3 s of whose recording a piece is missing."""
    times = np.arange(0, 5000, 1000 / rate)
    kept = (times < at * 1000) | (times >= (at + gap) * 1000)
    with collect_damage() as notes:
        IMU.read_value(
            timed(motion(len(times), rate)[:, kept], times[kept]), WINDOW, train=False, rng=RNG
        )
    return notes


@pytest.mark.parametrize("at", [0.65, 1.0, 1.8, 2.8], ids=["before", "start", "middle", "end"])
@pytest.mark.parametrize("rate", [20.0, 50.0, 200.0, 1000.0])
def test_a_gap_in_a_window_is_noted_or_too_much(at: float, rate: float) -> None:
    """Else the samples around it would be stretched over it."""
    assert window_with_gap(0.04, at, rate) == []
    notes = window_with_gap(0.4, at, rate)
    if at == 0.65:  # 0.05 s reach into the window
        assert notes == []
    elif at == 1.8:
        assert len(notes) == 1 and "of its 2 s have no samples" in notes[0]
        with pytest.raises(SampleError, match=r"window 1 to 3 s has gaps: 0\.\d+ s of its 2 s"):
            window_with_gap(0.6, at, rate)
    else:  # filled with zeros, as in the reference
        assert len(notes) == 1 and "at its ends have no samples" in notes[0]
        assert len(window_with_gap(0.6, at, rate)) == 1


def test_a_gap_in_a_recording_without_a_window_is_noted() -> None:
    for missing, is_used in ((80, True), (160, False)):
        times = np.delete(np.arange(400), slice(100, 100 + missing)) * 5.0
        parts = timed(np.delete(motion(400), slice(100, 100 + missing), axis=1), times)
        with collect_damage() as notes:
            if is_used:
                IMU.read_value(parts, {}, train=False, rng=RNG)
                assert len(notes) == 1 and "the recording has gaps: 0.4" in notes[0]
            else:
                with pytest.raises(SampleError, match="has gaps: 0"):
                    IMU.read_value(parts, {}, train=False, rng=RNG)


@pytest.mark.parametrize("gaps", [1, 2, 5])
def test_gaps_of_one_length_do_not_hide_each_other(gaps: int) -> None:
    """0.1 s of samples at 200 Hz, then nothing for 0.3 s, again and again."""
    at = np.arange(0, 2000, 5.0)
    times = at[(at % 400 < 100) | (at >= 400 * gaps)]
    between, _ = measure_gaps(times, 0.0, 2000.0)
    assert between == pytest.approx(305.0 * (gaps - (gaps == 5)))  # the fifth is at the end


@pytest.mark.parametrize("jitter", [0.0, 0.001, 0.15])
@pytest.mark.parametrize("rate", [4, 8, 10, 12, 50])
def test_slow_and_uneven_sensors_have_no_gaps(rate: int, jitter: float) -> None:
    at = np.arange(2 * rate) / rate * 1000
    times = at + RNG.uniform(-1, 1, len(at)) * jitter * 1000 / rate
    assert measure_gaps(np.sort(times), 0.0, 2000.0) == (0.0, 0.0)


@pytest.mark.parametrize("pause", [120.0, 400.0])
def test_uneven_bursts_have_no_gaps(pause: float) -> None:
    starts = np.arange(0, 2000, pause) + RNG.uniform(0, 0.1 * pause, len(np.arange(0, 2000, pause)))
    times = (starts[:, None] + np.arange(20) * 0.01).reshape(-1)
    between, _ = measure_gaps(times, 0.0, 2000.0)
    assert between == 0


@pytest.mark.parametrize("burst", [8, 32, 64])
def test_the_rhythm_of_bursts_is_no_gap(burst: int) -> None:
    """A sensor at 200 Hz that hands over many samples at once."""
    at = np.arange(2000)
    times = at // burst * burst * 5.0 + at % burst * 0.01
    with collect_damage() as notes:
        IMU.read_value(timed(motion(2000), times), WINDOW, train=False, rng=RNG)
    assert notes == []


@pytest.mark.parametrize(
    "parts",
    [
        {"imu": npy(np.zeros(400))},
        {"imu": npy(motion(9))},
        {"imu": npy(motion(2000))},
        {"imu": npy(np.full((6, 400), np.inf))},
        {"imu": npy(motion(400) * 1e300)},
        timed(motion(400), np.arange(399) * 5.0),
        timed(motion(400), np.zeros(400)),
        timed(motion(400), -np.arange(400) * 5.0),
        timed(motion(400), np.full(400, np.nan)),
    ],
)
def test_bad_recordings_are_refused(parts: dict[str, Part]) -> None:
    with pytest.raises(SampleError):
        values(parts)


def ego4d_csv(samples: int, *, skip: int = 0) -> str:
    """Ego4D's columns, gyroscope first; the first `skip` rows lie outside the video."""
    lines = [
        "component_idx,component_timestamp_ms,canonical_timestamp_ms,gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z"
    ]
    for i in range(samples):
        canonical = "" if i < skip else (i - skip) * 5.0
        lines.append(
            f"0,{i * 5.0},{canonical},"
            + ",".join(str(0.01 * (i + c / 10)) for c in (4, 5, 6, 1, 2, 3))
        )
    return "\n".join(lines) + "\n"


def test_an_ego4d_csv_gives_accelerometer_then_gyroscope() -> None:
    got = values({"imu": Part("csv", ego4d_csv(1000, skip=30).encode())}, WINDOW)
    np.testing.assert_allclose(got[:, 0], 2.3 + 0.001 * np.arange(1, 7), rtol=1e-6)


def test_a_csv_without_times_is_a_ready_window() -> None:
    text = "acc_x,acc_y,acc_z,gyr_x,gyr_y,gyr_z\n" + "1,2,3,4,5,6\n" * 400
    assert values({"imu": Part("csv", text.encode())})[:, 100].tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b,c\n1,2,3\n",
        "accl_x,accl_y,accl_z,gyro_x,gyro_y,gyro_z\n1,2,3\n",
        "accl_x,accl_y,accl_z,gyro_x,gyro_y,gyro_z\n1,2,3,4,5,x\n",
        "accl_x,accl_y,accl_z,gyro_x,gyro_y,gyro_z\n" + "1,2,3,4,5,nan\n" * 400,
        "\x00\x01",
    ],
)
def test_bad_csvs_are_refused(text: str) -> None:
    with pytest.raises(SampleError):
        values({"imu": Part("csv", text.encode())})


def test_a_csv_with_other_columns_learns_which_are_missing() -> None:
    text = "time,ax,ay,up,gx,gy,gz\n0,1,2,3,4,5,6\n"
    with pytest.raises(SampleError) as error:
        values({"imu": Part("csv", text.encode())})
    assert "it has no column for accelerometer z; " in error.value.what
    assert "its columns are time, ax, ay, up, gx, gy, gz" in error.value.what
    assert "accl_x, accl_y, accl_z, gyro_x, gyro_y, gyro_z" in error.value.do


def test_a_recording_given_by_hand_finds_its_times_and_window(tmp_path: Path) -> None:
    (tmp_path / "walk.npy").write_bytes(npy(motion(2000)).data)
    (tmp_path / "walk.timestamps.npy").write_bytes(npy(np.arange(2000) * 5.0).data)
    (tmp_path / "walk.window.json").write_text(json.dumps(WINDOW))
    got = values(IMU.read_parts(tmp_path / "walk.npy"))
    np.testing.assert_array_equal(got, motion(2000)[:, 200:600].astype(np.float32))


def test_fmri_repetitions_are_averaged() -> None:
    scans = np.random.default_rng(0).normal(size=(3, 15724)).astype(np.float32)
    got = FMRI.transform(FMRI.decode({"fmri": npy(scans)}, {}), train=True, rng=RNG)
    assert got.shape == (1, 15724) and got.dtype == torch.float32
    np.testing.assert_allclose(got[0], scans.mean(0), atol=1e-6)
    one = FMRI.transform(FMRI.decode({"fmri": npy(scans[0])}, {}), train=False, rng=RNG)
    np.testing.assert_array_equal(one[0], scans[0])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 15723)),
        np.zeros((0, 15724)),
        np.zeros((1, 3, 15724)),
        np.float64(3.0),
        np.full((1, 15724), np.nan),
        np.full(15724, 1e300),
    ],
)
def test_bad_fmri_is_refused(array: np.ndarray) -> None:
    with pytest.raises(SampleError):
        FMRI.decode({"fmri": npy(array)}, {})


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["<f4", ">f8", "<i2", "<f2"]), st.booleans())
def test_every_numeric_npy_is_read(kind: str, fortran: bool) -> None:
    scans = (np.random.default_rng(0).normal(size=(2, 15724)) * 900).astype(kind)
    stored = {"fmri": npy(np.asfortranarray(scans) if fortran else scans)}
    got = FMRI.decode(stored, {"fmri_scale": 300})
    np.testing.assert_allclose(got, scans.astype(np.float64).mean(0) / 300, atol=1e-6)


@pytest.mark.parametrize("kind", ["<i2", "<i4", "|u1", "<f4", "<f8"])
@pytest.mark.parametrize("size", [1, 300])
def test_whole_numbers_are_no_responses_unless_their_factor_is_stated(kind: str, size: int) -> None:
    """NSD's betas are percent times 300 as int16: small ones pass for percent otherwise."""
    scans = np.random.default_rng(0).integers(0, 3 * size, (2, 15724)).clip(0, 250).astype(kind)
    with pytest.raises(SampleError, match=r"whole numbers") as error:
        FMRI.decode({"fmri": npy(scans)}, {})
    assert '{"fmri_scale": 300}' in error.value.do
    got = FMRI.decode({"fmri": npy(scans)}, {"fmri_scale": 300})
    np.testing.assert_allclose(got, scans.mean(0) / 300, atol=1e-6)
    if scans.dtype.kind == "f":  # a missing value makes them no responses
        scans[0, 3] = np.nan
        with pytest.raises(SampleError, match=r"whole numbers"):
            FMRI.decode({"fmri": npy(scans)}, {})


@pytest.mark.parametrize("scale", [0, -300, "300", True, float("nan"), float("inf"), [300]])
def test_a_factor_that_is_none_is_refused(scale: object) -> None:
    with pytest.raises(SampleError, match=r"fmri_scale is .*, not a number above 0"):
        FMRI.decode({"fmri": npy(np.ones(15724, np.int16))}, {"fmri_scale": scale})


@pytest.mark.parametrize("largest", [999.0, 1001.0])
def test_one_limit_of_responses_holds_before_and_after_the_transform(largest: float) -> None:
    scan = np.random.default_rng(0).normal(size=15724).astype(np.float32)
    scan[7] = largest
    value = torch.from_numpy(scan)[None]
    if largest < FMRI.limits.magnitude:
        assert FMRI.decode({"fmri": npy(scan)}, {})[7] == largest
        check_input(FMRI.limits, value, "fmri")
        return
    with pytest.raises(SampleError, match="a response of 1001; the limit is 1000"):
        FMRI.decode({"fmri": npy(scan)}, {})
    with pytest.raises(SampleError, match="limit is 1000"):
        check_input(FMRI.limits, value, "fmri")


def test_pickled_and_lying_npy_files_are_refused() -> None:
    good = npy(np.zeros(15724)).data
    texts = npy(np.array(["a"] * 10)).data
    objects = good.replace(b"<f8", b"|O ")
    lying = good.replace(b"(15724,)", b"(99999,)")
    for data in (objects, texts, lying, good[:-1], good + b"\0", good[:8], b"\x93NUMPY\x09\x00"):
        with pytest.raises(SampleError, match="NumPy"):
            FMRI.decode({"fmri": Part("npy", data)}, {})
