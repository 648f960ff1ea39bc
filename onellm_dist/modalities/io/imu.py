"""Inertial recordings from NumPy (imu2clip's format) and CSV (Ego4D's format)."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from dataclasses import dataclass

import numpy as np

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.io.arrays import read_npy, require_finite

CHANNELS = (
    "accelerometer x",
    "accelerometer y",
    "accelerometer z",
    "gyroscope x",
    "gyroscope y",
    "gyroscope z",
)
_AXIS = re.compile(r"(acc|accl|accel|gyr|gyro)[_ ]?([xyz])")
_AXES = {
    "ax": "accl_x",
    "ay": "accl_y",
    "az": "accl_z",
    "gx": "gyro_x",
    "gy": "gyro_y",
    "gz": "gyro_z",
}
"""Short name of a column to the name that messages ask for."""
_TIMES = ("canonical_timestamp_ms", "timestamp_ms", "component_timestamp_ms")


@dataclass(frozen=True)
class ImuRecording:
    """A recording of any length.

    Attributes:
        signal: [6, N] fp64: accelerometer x, y, z, gyroscope x, y, z.
        times: [N] fp64 in milliseconds; None if unknown.
    """

    signal: np.ndarray
    times: np.ndarray | None


def read_recording(part: Part, timestamps: Part | None) -> ImuRecording:
    """Read `.npy` [6, N], or `.csv` with a header.

    A CSV names its columns as Ego4D does: `accl_x` ... `gyro_z` (`acc`, `accel` and `gyr` are
    accepted too). Times are in `canonical_timestamp_ms`, `timestamp_ms` or
    `component_timestamp_ms`, the first of these that it has. Rows without a canonical time lie
    outside the video and are left out, as Ego4D's documentation says.

    Args:
        part: the recording.
        timestamps: [N] in milliseconds, for `.npy`.

    Raises:
        SampleError: the file is neither, has values that are not finite, or has times that do not
            fit or run backwards.
    """
    name = f".{part.extension}"
    if part.data[:6] == b"\x93NUMPY":
        signal = read_npy(part)
        if signal.ndim != 2 or signal.shape[0] != len(CHANNELS):
            raise _recording_error(f"{name} has shape {signal.shape}, not [6, samples]")
        recording = ImuRecording(
            signal.astype(np.float64),
            read_npy(timestamps).astype(np.float64).reshape(-1) if timestamps else None,
        )
    else:
        recording = _read_csv(part.data, name)
        require_finite(recording.signal, name)
    if recording.times is not None:
        _check_times(recording.times, recording.signal.shape[1], name)
    return recording


def _check_times(times: np.ndarray, samples: int, name: str) -> None:
    require_finite(times, f"{name} (times)")
    if len(times) != samples:
        raise _recording_error(f"{name} has {samples} samples and {len(times)} timestamps")
    if (np.diff(times) < 0).any():
        at = int(np.argmax(np.diff(times) < 0)) + 1
        raise _recording_error(
            f"{name}: its timestamps run backwards at sample {at} "
            f"({times[at - 1]:g} ms, then {times[at]:g} ms)"
        )


def _read_csv(data: bytes, name: str) -> ImuRecording:
    try:
        rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        header = [cell.strip().lower() for cell in next(rows)]
        columns = _find_columns(header)
        time = next((header.index(t) for t in _TIMES if t in header), None)
        kept = [row for row in rows if row and (time is None or _is_given(row[time]))]
        signal = np.array([[float(row[i]) for i in columns] for row in kept], np.float64)
        times = None if time is None else np.array([float(row[time]) for row in kept], np.float64)
    except (UnicodeDecodeError, csv.Error, ValueError, IndexError, StopIteration) as error:
        raise _recording_error(
            f"{name} ({len(data)} bytes) is not a readable CSV of a recording: "
            f"{str(error) or 'it is empty'}"
        ) from error
    return ImuRecording(signal.reshape(-1, 6).T, times)


def _find_columns(header: list[str]) -> list[int]:
    """The columns of the six channels, in the order of `CHANNELS`.

    Raises:
        ValueError: one of them is missing.
    """
    columns: dict[str, int] = {}
    for i, cell in enumerate(header):
        match = _AXIS.fullmatch(cell)
        if match:
            columns[match[1][0] + match[2]] = i
    missing = [wanted for axis, wanted in _AXES.items() if axis not in columns]
    if missing:
        raise ValueError(
            f"it has no column {', '.join(missing)} (m/s^2, rad/s); "
            f"its columns are {textwrap.shorten(', '.join(header), 200) or 'none'}"
        )
    return [columns[axis] for axis in _AXES]


def _is_given(cell: str) -> bool:
    return cell.strip().lower() not in ("", "null", "nan", "none")


def _recording_error(what: str) -> SampleError:
    return SampleError(
        what,
        "the sample has no usable inertial signal.",
        "store .npy [6, N] (accelerometer xyz in m/s^2, gyroscope xyz in rad/s) with timestamps in "
        f"ms, or a CSV with the columns {', '.join(_AXES.values())} and timestamp_ms.",
    )
