"""Inertial recordings as people have them: names, units, clocks, faults at one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_samples import npy
from signal_mutations import imu_csv, walk

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.io.imu import read_recording
from onellm_dist.modalities.io.imu_times import PLAUSIBLE_HZ, find_ascending, scale_times

IMU = get_modality("imu")
RNG = np.random.default_rng(0)
G = 9.80665
WINDOW = {"window_start": 1.0, "window_end": 3.0}


def values(data: bytes, meta: dict[str, Any] | None = None) -> torch.Tensor:
    parts = {"imu": Part("csv", data)}
    return IMU.read_value(parts, meta or {}, train=False, rng=RNG)


def refusal(data: bytes, meta: dict[str, Any] | None = None) -> str:
    with pytest.raises(SampleError) as error:
        values(data, meta)
    assert error.value.why and error.value.do
    return error.value.what


USUAL = values(imu_csv())


@pytest.mark.parametrize(
    "names",
    [
        "time_ms,ax,ay,az,gx,gy,gz",
        "timestamp_ms,accel_x,accel_y,accel_z,gyr_x,gyr_y,gyr_z",
        "Timestamp (ms),AccX,AccY,AccZ,GyroX,GyroY,GyroZ",
        "t_ms,acc x,acc y,acc z,gyr x,gyr y,gyr z",
        "ts [ms],Accelerometer X,Accelerometer Y,Accelerometer Z,"
        "Gyroscope X,Gyroscope Y,Gyroscope Z",
        "time,linear_acceleration.x,linear_acceleration.y,linear_acceleration.z,"
        "angular_velocity.x,angular_velocity.y,angular_velocity.z",
        "elapsed_ms,imu_acc_x,imu_acc_y,imu_acc_z,imu_gyro_x,imu_gyro_y,imu_gyro_z",
        "timestamp,accl-x,accl-y,accl-z,wx,wy,wz",
        "time,acceleration_x_axis,acceleration_y_axis,acceleration_z_axis,"
        "rotation_rate_x,rotation_rate_y,rotation_rate_z",
        "time,x_accel,y_accel,z_accel,x_gyro,y_gyro,z_gyro",
        "\ufefftime,ax (m/s²),ay (m/s²),az (m/s²),gx (rad/s),gy (rad/s),gz (rad/s)",
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_usual_names_of_columns(names: str, delimiter: str) -> None:
    data = imu_csv(names.replace(",", delimiter), delimiter=delimiter)
    assert torch.equal(values(data), USUAL)


def test_columns_may_come_in_any_order_among_others() -> None:
    rows = imu_csv("timestamp_ms,ax,ay,az,gx,gy,gz").decode().splitlines()
    order = [6, 2, 0, 1, 4, 5, 3]
    lines = ["# a comment", ""]
    for number, row in enumerate(rows):
        cells = row.split(",")
        extra = "label" if number == 0 else "walking"
        lines.append(",".join([extra, *(cells[i] for i in order), "mag_x" if not number else "7"]))
    assert torch.equal(values("\n".join(lines).encode()), USUAL)


@pytest.mark.parametrize(
    ("names", "accelerometer", "gyroscope"),
    [
        ("t,ax (g),ay (g),az (g),gx (deg/s),gy (deg/s),gz (deg/s)", 1 / G, 180 / np.pi),
        ("t,ax_g,ay_g,az_g,gx_dps,gy_dps,gz_dps", 1 / G, 180 / np.pi),
        (
            "t,acc_x [mg],acc_y [mg],acc_z [mg],gyr_x [°/s],gyr_y [°/s],gyr_z [°/s]",
            1000 / G,
            180 / np.pi,
        ),
        ("t,ax_mps2,ay_mps2,az_mps2,gyro_x_rad_s,gyro_y_rad_s,gyro_z_rad_s", 1.0, 1.0),
        ("t,ax,ay,az,gx (mdps),gy (mdps),gz (mdps)", 1.0, 180_000 / np.pi),
    ],
)
def test_units_that_columns_name(names: str, accelerometer: float, gyroscope: float) -> None:
    data = imu_csv(names, accelerometer=accelerometer, gyroscope=gyroscope)
    torch.testing.assert_close(values(data), USUAL, atol=1e-5, rtol=1e-5)


def test_units_that_the_samples_json_names() -> None:
    names = "t,ax,ay,az,gx,gy,gz"
    data = imu_csv(names, time=1.0, accelerometer=1 / G, gyroscope=180 / np.pi)
    stated = {"accel_unit": "g", "gyro_unit": "deg/s", "time_unit": "s"}
    torch.testing.assert_close(values(data, stated), USUAL, atol=1e-5, rtol=1e-5)
    signal = walk(np.arange(400) / 200)
    signal[:3] /= G
    got = IMU.read_value({"imu": npy(signal)}, {"accel_unit": "g"}, train=False, rng=RNG)
    expected = torch.from_numpy(walk(np.arange(400) / 200)).float()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert "not known; known are m/s^2, g, mg" in refusal(data, {"accel_unit": "furlongs"})
    assert "accel_unit" in refusal(imu_csv("t,ax (g),ay (g),az (g),gx,gy,gz"), {"accel_unit": "mg"})


@pytest.mark.parametrize(
    ("accelerometer", "gyroscope", "message"),
    [
        (1000 / G, 1.0, "accelerations exceed 200"),
        (16384 / G, 1.0, "accelerations exceed 200"),
        (1.0, 180 / np.pi, "too fast for rad/s"),
    ],
)
def test_unstated_units_must_be_plausible(
    accelerometer: float, gyroscope: float, message: str
) -> None:
    said = refusal(imu_csv(accelerometer=accelerometer, gyroscope=gyroscope))
    assert message in said and "name" in said


@pytest.mark.parametrize(
    ("accelerometer", "gyroscope", "stated", "message"),
    [
        (1000 / G, 1.0, {}, "accelerations exceed 200"),
        (1.0, 180 / np.pi, {}, "too fast for rad/s"),
        (1.0, 180_000 / np.pi, {"gyro_unit": "deg/s"}, "too fast for its unit"),
        (1.0, 180 / np.pi, {"gyro_unit": "rad/s"}, "too fast for its unit"),
        (1000 / G, 1.0, {"accel_unit": "g"}, "accelerations exceed 20.3943 g"),
        (1.0, 1.0, {"accel_unit": ["g"]}, "not the name of a unit"),
        (1.0, 1.0, {"time_unit": 1000}, "not the name of a unit"),
    ],
)
def test_units_of_numpy_files_must_be_plausible_too(
    accelerometer: float, gyroscope: float, stated: dict[str, Any], message: str
) -> None:
    signal = walk(np.arange(400) / 200)
    signal[:3] *= accelerometer
    signal[3:] *= gyroscope
    with pytest.raises(SampleError) as error:
        IMU.read_value({"imu": npy(signal)}, stated, train=False, rng=RNG)
    assert message in error.value.what


@pytest.mark.parametrize("unit", ["m/s^2", "g", "mg"])
@pytest.mark.parametrize("said", ["m/s^2", "g", "mg"])
def test_gravity_at_rest_holds_a_stated_unit_to_its_word(unit: str, said: str) -> None:
    size = {"m/s^2": G, "g": 1.0, "mg": 1000.0}[unit]
    signal = np.zeros((6, 400))
    signal[2], signal[3] = size, np.sin(np.arange(400) / 50)
    parts = {"imu": npy(signal)}
    if unit == said:
        got = IMU.read_value(parts, {"accel_unit": said}, train=False, rng=RNG)
        assert got[2].mean().item() == pytest.approx(G, rel=1e-4)
        return
    with pytest.raises(SampleError) as error:
        IMU.read_value(parts, {"accel_unit": said}, train=False, rng=RNG)
    assert f"gravity in {unit} and not in {said}" in error.value.what


def test_gravity_in_g_is_recognised() -> None:
    rows = "".join(f"{5 * i},0.01,{0.02 * (i % 2)},0.999,0,0,0\n" for i in range(400))
    assert "in g" in refusal(f"t,ax,ay,az,gx,gy,gz\n{rows}".encode())
    assert values(f"t,ax (g),ay (g),az (g),gx,gy,gz\n{rows}".encode())[2].max() > 9


@pytest.mark.parametrize(
    ("name", "unit"), [("s", 1.0), ("ms", 1e3), ("us", 1e6), ("ns", 1e9), ("seconds", 1.0)]
)
@pytest.mark.parametrize("rate", [50.0, 100.0, 400.0])
@pytest.mark.seconds
def test_every_unit_of_time_gives_the_same_window(name: str, unit: float, rate: float) -> None:
    expected = values(imu_csv(seconds=6.0, rate=rate), WINDOW)
    for column in (f"time_{name}", f"timestamp ({name})", "time", "timestamp"):
        data = imu_csv(f"{column},ax,ay,az,gx,gy,gz", 6.0, rate, time=unit)
        torch.testing.assert_close(values(data, WINDOW), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stated", ["timestamp_ms", "canonical_timestamp_ms", "time_us", "t_ns"])
def test_a_stated_unit_that_cannot_be_is_refused(stated: str) -> None:
    said = refusal(imu_csv(f"{stated},ax,ay,az,gx,gy,gz", 6.0, time=1.0), WINDOW)
    assert "samples a second; in s it would be 100" in said


def test_times_of_npy_may_be_in_seconds() -> None:
    at = np.arange(1200) / 200
    for unit in (1.0, 1e3, 1e6, 1e9):
        parts = {"imu": npy(walk(at)), "timestamps": npy(at * unit, "timestamps.npy")}
        got = IMU.read_value(parts, WINDOW, train=False, rng=RNG)
        np.testing.assert_array_equal(got, walk(at)[:, 200:600].astype(np.float32))


@given(
    st.floats(*PLAUSIBLE_HZ, exclude_max=True),
    st.sampled_from([1.0, 1e3, 1e6, 1e9]),
    st.floats(0, 1e6),
)
@settings(max_examples=40, deadline=None)
def test_one_unit_of_time_is_plausible(rate: float, unit: float, start: float) -> None:
    times = start * unit + np.arange(50) / rate * unit
    step = float(np.median(np.diff(times))) * 1000 / unit
    if not PLAUSIBLE_HZ[0] * 1.001 < 1000 / step < PLAUSIBLE_HZ[1] * 0.999:
        return  # rounding decides
    got = scale_times(times, None)
    np.testing.assert_allclose(np.diff(got), np.diff(times) * 1000 / unit, rtol=1e-5)


def bursts(count: int = 1200) -> np.ndarray:
    """Times in ms of a sensor at 200 Hz that hands over four samples at once, every 20 ms."""
    at = np.arange(count)
    return at // 4 * 20.0 + at % 4 * 0.05


def burst_csv(column: str, unit: float) -> bytes:
    lines = imu_csv(f"{column},ax,ay,az,gx,gy,gz", 6.0, 200.0).decode().splitlines()
    times = bursts() * unit / 1000
    rows = [f"{t:.9g},{row.split(',', 1)[1]}" for t, row in zip(times, lines[1:], strict=True)]
    return "\n".join([lines[0], *rows]).encode()


@pytest.mark.parametrize("name", ["s", "ms", "us", "ns"])
@pytest.mark.seconds
def test_samples_in_bursts_need_a_stated_unit(name: str) -> None:
    """The median step, 0.05 ms, would be 20 Hz if it were in seconds."""
    unit = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[name]
    stated = read_recording(Part("csv", burst_csv(f"timestamp_{name}", unit)), None).times
    meta = {"time_unit": name}
    by_json = read_recording(Part("csv", burst_csv("time", unit)), None, meta).times
    assert stated is not None and by_json is not None
    np.testing.assert_allclose(stated, bursts(), rtol=1e-6)
    np.testing.assert_array_equal(by_json, stated)
    if name in ("ms", "us"):
        said = refusal(burst_csv("time", unit), WINDOW)
        assert "come in bursts" in said and "time_unit" in said and f"{name}:" in said


def test_times_of_npy_in_bursts_are_in_milliseconds() -> None:
    times = npy(bursts(), "timestamps.npy")
    recording = read_recording(npy(walk(np.arange(1200) / 200)), times)
    np.testing.assert_array_equal(recording.times, bursts())


def test_times_of_a_clock_count_from_the_start() -> None:
    epoch = 1_764_000_000.0
    rows = imu_csv("timestamp_ns,ax,ay,az,gx,gy,gz", 6.0, time=1e9).decode().splitlines()
    lines = [rows[0]]
    for row in rows[1:]:
        time, rest = row.split(",", 1)
        lines.append(f"{int(epoch * 1e9) + round(float(time))},{rest}")
    data = "\n".join(lines).encode()
    expected = values(imu_csv(seconds=6.0), WINDOW)
    torch.testing.assert_close(values(data, WINDOW), expected, atol=1e-3, rtol=0)
    absolute = {"window_start": epoch + 1, "window_end": epoch + 3}
    torch.testing.assert_close(values(data, absolute), expected, atol=1e-3, rtol=0)


FAULTS: dict[str, Callable[[list[str]], list[str]]] = {
    "an empty cell": lambda cells: [cells[0], "", *cells[2:]],
    "a word": lambda cells: [*cells[:3], "n/a", *cells[4:]],
    "NaN": lambda cells: [*cells[:4], "NaN", *cells[5:]],
    "infinity": lambda cells: [*cells[:6], "inf"],
    "a row that is cut": lambda cells: cells[:3],
    "a time that is none": lambda cells: ["soon", *cells[1:]],
    "a time far ahead": lambda cells: ["9e9", *cells[1:]],
    "a time far back": lambda cells: ["-5", *cells[1:]],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.seconds
def test_a_fault_costs_the_windows_around_it(fault: str) -> None:
    rows = imu_csv(seconds=12.0).decode().splitlines()
    rows[601] = ",".join(FAULTS[fault](rows[601].split(",")))  # at 6 s
    data = "\n".join(rows).encode()
    good = imu_csv(seconds=12.0)
    lost = 0
    for start in range(9):
        window = {"window_start": start + 0.5, "window_end": start + 2.5}
        if start in (4, 5):
            assert "has a fault: sample 600: " in refusal(data, window)
            lost += 1
        else:
            assert torch.equal(values(data, window), values(good, window))
    assert lost == 2
    assert "fault" in refusal("\n".join(rows[:1] + rows[500:700]).encode())


@given(st.floats(1, 60), st.integers(200, 1000))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_clock_that_is_set_back_costs_the_windows_around_it(back: float, at: int) -> None:
    signal, times = walk(np.arange(1200) / 100), np.arange(1200) * 10.0
    times[at:] -= back
    parts = {"imu": npy(signal), "timestamps": npy(times, "timestamps.npy")}
    moment = at / 100
    for start in np.arange(0, 9.5, 0.5):
        window = {"window_start": float(start), "window_end": float(start) + 2}
        if start + 2 < moment - back / 1000 - 0.02:
            got = IMU.read_value(parts, window, train=False, rng=RNG)
            assert got.abs().sum() > 0
        elif start < moment - back / 1000 - 0.011 and start + 2 > moment + 0.011 and back > 10:
            with pytest.raises(SampleError, match="backwards"):
                IMU.read_value(parts, window, train=False, rng=RNG)


def test_a_long_gap_costs_no_window_elsewhere() -> None:
    rows = imu_csv(seconds=12.0).decode().splitlines()
    for i in range(401, len(rows)):
        rows[i] = rows[i].replace(",", ",x", 1)
    data = "\n".join(rows).encode()
    assert torch.equal(values(data, WINDOW), values(imu_csv(seconds=12.0), WINDOW))
    assert "beyond the recording's end" in refusal(data, {"window_start": 3.0, "window_end": 5.0})
    rows[1:401] = rows[401:801]
    assert "none of its 1200 rows can be read" in refusal("\n".join(rows).encode(), WINDOW)


def test_a_recording_that_is_mostly_out_of_order_is_refused() -> None:
    signal = np.full((6, 400), np.nan)
    with pytest.raises(SampleError, match="100% of its 400 samples"):
        IMU.decode({"imu": npy(signal)}, {})
    times = np.concatenate([np.arange(600), np.arange(600)]) * 10.0
    parts = {"imu": npy(walk(np.arange(1200) / 100)), "timestamps": npy(times, "timestamps.npy")}
    with pytest.raises(SampleError, match="50% of its"):
        IMU.read_value(parts, WINDOW, train=False, rng=RNG)


@given(st.lists(st.one_of(st.integers(-20, 20), st.just(float("nan"))), max_size=12))
def test_as_few_samples_as_possible_are_left_out(listed: list[float]) -> None:
    times = np.array(listed, np.float64)
    kept = find_ascending(times)
    assert (np.diff(times[kept]) >= 0).all() and np.isfinite(times[kept]).all()
    longest: list[int] = []
    for value in times:
        if np.isfinite(value):
            before = [n for j, n in enumerate(longest) if n and times[j] <= value]
            longest.append(1 + max(before, default=0))
        else:
            longest.append(0)
    assert kept.sum() == max(longest, default=0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("time,ax,ay,az", "no column for gyroscope x, gyroscope y, gyroscope z; its columns are t"),
        ("ax,ay,az,gx,gy,gz,acc_x", "two columns for accelerometer x, 'ax' and 'acc_x'"),
        ("ax (counts),ay,az,gx,gy,gz", "unit 'counts' of the accelerometer is not known"),
        ("1.0,2.0,3.0,4.0,5.0,6.0", "first line holds numbers"),
    ],
)
def test_refusals_say_what_is_wrong_with_the_header(header: str, message: str) -> None:
    assert message in refusal(f"{header}\n1,2,3,4,5,6,7\n".encode())


def test_samples_may_be_rows_of_an_array() -> None:
    signal = walk(np.arange(400) / 200)
    one, other = (
        IMU.read_value({"imu": npy(a)}, {}, train=False, rng=RNG) for a in (signal, signal.T)
    )
    assert torch.equal(one, other)


def test_a_window_file_beside_the_recording_may_state_units(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(imu_csv("t,ax,ay,az,gx,gy,gz", 6.0, accelerometer=1 / G))
    (tmp_path / "a.window.json").write_text(json.dumps({**WINDOW, "accel_unit": "g"}))
    got = IMU.read_value(IMU.read_parts(tmp_path / "a.csv"), {}, train=False, rng=RNG)
    torch.testing.assert_close(got, values(imu_csv(seconds=6.0), WINDOW), atol=1e-5, rtol=0)


def test_an_empty_recording_is_refused_in_words() -> None:
    assert "it is empty" in refusal(b"")
    assert read_recording(Part("csv", b"t,ax,ay,az,gx,gy,gz\n"), None).signal.shape == (6, 0)
    assert "no samples" in refusal(b"t,ax,ay,az,gx,gy,gz\n", WINDOW)
