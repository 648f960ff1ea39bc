"""Inertial recordings from NumPy (imu2clip's format) and CSV (Ego4D's format, and others').

A fault at one place costs the windows around it, not the recording: samples that are unreadable or
whose times run backwards are left out, and the recording says where they were.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.io.arrays import read_npy
from onellm_dist.modalities.io.damage import DAMAGED_SHARE
from onellm_dist.modalities.io.imu_columns import (
    CHANNELS,
    UNITS,
    ImuColumns,
    find_columns,
    parse_unit,
)
from onellm_dist.modalities.io.imu_times import find_ascending, scale_times
from onellm_dist.modalities.io.imu_units import check_units
from onellm_dist.modalities.limits import LIMITS, check_count
from onellm_dist.modalities.meta_keys import MetaKey

_UNIT_KEYS = {"accelerometer": "accel_unit", "gyroscope": "gyro_unit", "time": "time_unit"}
"""What is measured to the key of a sample's json that states its unit."""


def _make_unit_key(kind: str) -> MetaKey:
    def parse(text: str) -> str:
        parse_unit(kind, text)
        return text

    return MetaKey(f"the unit of the {kind}: {UNITS[kind][1]}", parse)


UNIT_KEYS: Mapping[str, MetaKey] = {key: _make_unit_key(kind) for kind, key in _UNIT_KEYS.items()}
"""The keys of a sample's json that state units."""


@dataclass(frozen=True)
class ImuFault:
    """Where samples of a recording were left out, and why.

    Attributes:
        start: first time that it concerns, in milliseconds (or its sample, without times).
        end: last time that it concerns.
        what: what was wrong there.
    """

    start: float
    end: float
    what: str


@dataclass(frozen=True)
class ImuRecording:
    """A recording of any length.

    Attributes:
        signal: [6, N] fp64: accelerometer x, y, z in m/s^2, gyroscope x, y, z in rad/s, as far as
            the file states its units.
        times: [N] fp64 in milliseconds, never falling; None if unknown.
        faults: where samples are missing.
    """

    signal: np.ndarray
    times: np.ndarray | None
    faults: tuple[ImuFault, ...] = ()


@dataclass(frozen=True)
class _Table:
    """A recording as it is stored.

    Attributes:
        signal: [6, N] fp64; NaN where a value is missing.
        times: [N] fp64 in the file's unit.
        scales: the size of each channel's unit, where it is stated.
        time_scale: the size of the unit of time in milliseconds, where it is stated.
        usual_time: the unit of time to prefer where it is not stated.
        notes: number of a sample to what is wrong with it.
    """

    signal: np.ndarray
    times: np.ndarray | None
    scales: tuple[float | None, ...] = (None,) * len(CHANNELS)
    time_scale: float | None = None
    usual_time: float | None = None
    notes: Mapping[int, str] = field(default_factory=dict)


def read_recording(
    part: Part, timestamps: Part | None, meta: Mapping[str, Any] | None = None
) -> ImuRecording:
    """Read `.npy` [6, N] or [N, 6], or `.csv` with a header.

    Columns, units and times are documented at `ImuModality`. Rows of a CSV without a canonical time
    lie outside the video and are left out, as Ego4D's documentation says.

    Args:
        part: the recording.
        timestamps: [N] in milliseconds (or another unit that is plausible), for `.npy`.
        meta: may state units: `accel_unit`, `gyro_unit`, `time_unit`.

    Raises:
        SampleError: the file is neither, its units are not plausible, none of its samples can be
            used, or more than a quarter of them are out of order.
    """
    name = f".{part.extension}"
    try:
        is_npy = part.data[:6] == b"\x93NUMPY"
        table = _read_npy_table(part, timestamps, name) if is_npy else _read_csv(part.data)
        scales, time_scale = _get_scales(table, meta or {})
        check_units(table.signal, scales, is_raw=is_npy)
        times = None
        if table.times is not None:
            if len(table.times) != table.signal.shape[1]:
                raise ValueError(
                    f"it has {table.signal.shape[1]} samples and {len(table.times)} timestamps"
                )
            times = scale_times(table.times, time_scale, table.usual_time)
    except (UnicodeDecodeError, csv.Error, ValueError, IndexError, OverflowError) as error:
        raise _recording_error(
            f"{name} ({len(part.data)} bytes) is not a readable recording: {error}"
        ) from error
    factors = np.array([1.0 if s is None else s for s in scales])
    signal = table.signal if (factors == 1).all() else table.signal * factors[:, None]
    return _leave_out_faults(signal, times, table.notes, name)


def _read_npy_table(part: Part, timestamps: Part | None, name: str) -> _Table:
    signal = read_npy(part, finite=False)
    if signal.ndim == 2 and signal.shape[0] != len(CHANNELS) == signal.shape[1]:
        signal = signal.T
    if signal.ndim != 2 or signal.shape[0] != len(CHANNELS):
        raise ValueError(f"{name} has shape {signal.shape}, not [6, samples]")
    times = None
    if timestamps is not None:
        times = read_npy(timestamps, finite=False).astype(np.float64).reshape(-1)
    return _Table(signal.astype(np.float64), times, usual_time=1.0)


def _read_csv(data: bytes) -> _Table:
    lines = iter(io.StringIO(data.decode("utf-8-sig"), newline=""))
    first = next((s for s in lines if s.strip() and not s.lstrip().startswith("#")), "")
    delimiter = max(",;\t|", key=first.count)
    rows = csv.reader(chain([first], lines), delimiter=delimiter)
    header = [cell.strip() for cell in next(rows, [])]
    if not header:
        raise ValueError("it is empty")
    if all(_is_number(cell) for cell in header):
        raise ValueError("its first line holds numbers, not the names of its columns")
    columns = find_columns(header)
    time = columns.time
    kept = [r for r in rows if r and (time is None or len(r) <= time or _is_given(r[time]))]
    try:
        signal = np.array([[float(row[i]) for i in columns.signal] for row in kept], np.float64)
        times = None
        if time is not None:
            times = np.array([float(row[time]) for row in kept], np.float64)
        notes: Mapping[int, str] = {}
    except (ValueError, IndexError):
        signal, times, notes = _parse_rows(kept, columns, decimal_comma=delimiter != ",")
    return _Table(
        signal.reshape(-1, len(CHANNELS)).T,
        times,
        columns.scales,
        columns.time_scale,
        notes=notes,
    )


def _parse_rows(
    rows: list[list[str]], columns: ImuColumns, *, decimal_comma: bool
) -> tuple[np.ndarray, np.ndarray | None, dict[int, str]]:
    """Parse row by row: [N, 6], [N], and what is wrong with a row; NaN where it cannot be read.

    Raises:
        ValueError: not a single row can be read.
    """
    wanted = columns.signal if columns.time is None else (*columns.signal, columns.time)
    table = np.full((len(rows), len(wanted)), np.nan)
    notes: dict[int, str] = {}
    for number, row in enumerate(rows):
        for place, column in enumerate(wanted):
            cell = row[column].strip() if column < len(row) else ""
            try:
                table[number, place] = float(cell.replace(",", ".") if decimal_comma else cell)
            except ValueError:
                shown = f"is {cell[:40]!r}" if cell else "is empty"
                notes.setdefault(number, f"{columns.names[column]} {shown}")
    if rows and len(notes) == len(rows):
        raise ValueError(f"none of its {len(rows)} rows can be read; in the first {notes[0]}")
    signal = table[:, : len(CHANNELS)]
    return signal, None if columns.time is None else table[:, len(CHANNELS)], notes


def _is_given(cell: str) -> bool:
    return cell.strip().lower() not in ("", "null", "nan", "none")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _get_scales(
    table: _Table, meta: Mapping[str, Any]
) -> tuple[tuple[float | None, ...], float | None]:
    """The sizes of all units that the file or the sample's json states.

    Raises:
        ValueError: a unit is not known, or the two contradict each other.
    """
    stated: dict[str, float] = {}
    for kind, key in _UNIT_KEYS.items():
        unit = meta.get(key)
        if unit is not None and not isinstance(unit, str):
            raise ValueError(f"{key} in the sample's json is {unit!r}, not the name of a unit")
        if unit is not None:
            stated[kind] = parse_unit(kind, unit)
    scales = []
    for channel, own in zip(CHANNELS, table.scales, strict=True):
        scales.append(_merge(channel.split()[0], own, stated))
    time_scale = _merge("time", table.time_scale, stated)
    return tuple(scales), time_scale


def _merge(kind: str, own: float | None, stated: Mapping[str, float]) -> float | None:
    other = stated.get(kind)
    if own is not None and other is not None and own != other:
        raise ValueError(
            f"its header states another unit of the {kind} than {_UNIT_KEYS[kind]} in the "
            f"sample's json; remove one"
        )
    return other if own is None else own


def _leave_out_faults(
    signal: np.ndarray, times: np.ndarray | None, notes: Mapping[int, str], name: str
) -> ImuRecording:
    """Leave out samples that are not finite or out of order, and say where they were.

    Raises:
        SampleError: none is left, or more than `DAMAGED_SHARE` are out of order: what belongs where
            is a guess then.
    """
    total = signal.shape[1]
    check_count(LIMITS["imu"], "values", max(1, signal.size), name)
    finite = np.isfinite(signal).all(0)
    ascending = np.ones(total, bool) if times is None else find_ascending(times)
    good = finite & ascending
    if good.all():
        return ImuRecording(signal, times)
    faults = tuple(_list_faults(signal, times, good, ascending, notes))
    for share, limit in (((~ascending).mean(), DAMAGED_SHARE), ((~good).mean(), 1 - 1 / total)):
        if share > limit:
            raise _recording_error(
                f"{name}: {share:.0%} of its {total} samples cannot be used; {faults[0].what}"
            )
    return ImuRecording(signal[:, good], None if times is None else times[good], faults)


def _list_faults(
    signal: np.ndarray,
    times: np.ndarray | None,
    good: np.ndarray,
    ascending: np.ndarray,
    notes: Mapping[int, str],
) -> Iterator[ImuFault]:
    """One fault for each stretch of samples that are left out."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], good, [True]])))
    for first, end in edges.reshape(-1, 2).tolist():
        what = f"sample {first}: " + (
            notes.get(first)
            or (
                "its time runs backwards or is not finite"
                if not ascending[first]
                else f"{CHANNELS[int(np.argmin(np.isfinite(signal[:, first])))]} is not finite"
            )
        )
        if times is None:
            yield ImuFault(first, end - 1, what)
            continue
        if ascending[first:end].all():  # in order: the fault is where its samples are
            yield ImuFault(float(times[first]), float(times[end - 1]), what)
            continue
        # Out of order: between its neighbours, and wherever its own times claim to be.
        around = [float(times[i]) for i in (first - 1, end) if 0 <= i < len(times)]
        yield ImuFault(min(around, default=-np.inf), max(around, default=np.inf), what)
        own = times[first:end][np.isfinite(times[first:end])]
        if len(own):
            yield ImuFault(float(own.min()), float(own.max()), what)


def _recording_error(what: str) -> SampleError:
    return SampleError(
        what,
        "the sample has no usable inertial signal.",
        "store .npy [6, N] (accelerometer xyz in m/s^2, gyroscope xyz in rad/s) with timestamps in "
        "ms, or a CSV with the columns accl_x, accl_y, accl_z, gyro_x, gyro_y, gyro_z and "
        "timestamp_ms; other names and units are in the documentation of media formats.",
    )
