"""Inertial recordings from NumPy (imu2clip's layout) and CSV (Ego4D's layout)."""

from __future__ import annotations

import csv
import io
import re
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
_TIMES = ("canonical_timestamp_ms", "timestamp_ms", "component_timestamp_ms")


@dataclass(frozen=True)
class Recording:
    """`signal` [6, N] fp64 (accelerometer xyz, gyroscope xyz), and `times` [N] fp64 in ms where they are known."""

    signal: np.ndarray
    times: np.ndarray | None


def read_recording(part: Part, timestamps: Part | None) -> Recording:
    """`.npy` [6, N] (with its timestamps part, [N] in ms), or `.csv` with a header.

    A CSV names its columns like Ego4D: `accl_x ... gyro_z` (acc, accel and gyr are known too) and, where there are times,
    `canonical_timestamp_ms`, `timestamp_ms` or `component_timestamp_ms`, the first of these it has. Rows without a canonical
    time lie outside the video and are left out, as Ego4D's documentation says of them.

    Raises:
        SampleError: not readable as either, not finite, or times that do not fit or run backwards.
    """
    name = f".{part.extension}"
    if part.data[:6] == b"\x93NUMPY":
        signal = read_npy(part)
        if signal.ndim != 2 or signal.shape[0] != len(CHANNELS):
            raise _no_recording(f"{name} has shape {signal.shape}, not [6, samples]")
        recording = Recording(
            signal.astype(np.float64),
            read_npy(timestamps).astype(np.float64).reshape(-1) if timestamps else None,
        )
    else:
        recording = _read_csv(part.data, name)
        require_finite(recording.signal, name)
    times = recording.times
    if times is not None:
        require_finite(times, f"{name} (times)")
        if len(times) != recording.signal.shape[1]:
            raise _no_recording(
                f"{name} has {recording.signal.shape[1]} samples and {len(times)} timestamps"
            )
        if (np.diff(times) < 0).any():
            at = int(np.argmax(np.diff(times) < 0)) + 1
            raise _no_recording(
                f"{name}: its timestamps run backwards at sample {at} ({times[at - 1]:g} ms, then {times[at]:g} ms)"
            )
    return recording


def _read_csv(data: bytes, name: str) -> Recording:
    try:
        rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        header = [cell.strip().lower() for cell in next(rows)]
        columns: dict[str, int] = {}
        for i, cell in enumerate(header):
            match = _AXIS.fullmatch(cell)
            if match:
                columns[match[1][0] + match[2]] = i
        order = [columns[key] for key in ("ax", "ay", "az", "gx", "gy", "gz")]
        time = next((header.index(t) for t in _TIMES if t in header), None)
        kept = [row for row in rows if row and (time is None or _given(row[time]))]
        signal = (
            np.array([[float(row[i]) for i in order] for row in kept], np.float64).reshape(-1, 6).T
        )
        times = None if time is None else np.array([float(row[time]) for row in kept], np.float64)
    except (
        UnicodeDecodeError,
        csv.Error,
        ValueError,
        KeyError,
        IndexError,
        StopIteration,
    ) as error:
        detail = (
            f"no column for {error}"
            if isinstance(error, KeyError)
            else (str(error) or "it is empty")
        )
        raise _no_recording(
            f"{name} ({len(data)} bytes) is no readable CSV of a recording: {detail}"
        ) from error
    return Recording(signal, times)


def _given(cell: str) -> bool:
    return cell.strip().lower() not in ("", "null", "nan", "none")


def _no_recording(what: str) -> SampleError:
    return SampleError(
        what,
        "the sample has no usable inertial signal.",
        "store .npy [6, N] (accelerometer xyz, gyroscope xyz) with timestamps in ms, or Ego4D's CSV.",
    )
