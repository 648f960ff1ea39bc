"""Which column of a table of inertial measurements is what, and in which unit."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

CHANNELS = (
    "accelerometer x",
    "accelerometer y",
    "accelerometer z",
    "gyroscope x",
    "gyroscope y",
    "gyroscope z",
)
_ACCELEROMETER = ("linear_acceleration", "accelerometer", "acceleration", "accel", "accl", "acc")
_GYROSCOPE = ("angular_velocity", "angular_rate", "rotation_rate", "gyroscope", "gyro", "gyr")
_SENSORS = {
    **dict.fromkeys((*_ACCELEROMETER, "a"), "accelerometer"),
    **dict.fromkeys((*_GYROSCOPE, "omega", "w", "g"), "gyroscope"),
}
_AXIS_LAST = re.compile(
    rf"(?:imu_)?({'|'.join(_SENSORS)})_?(?:axis_)?([xyz])(?:_axis)?(?:_([a-z0-9_]+))?"
)
_AXIS_FIRST = re.compile(
    rf"(?:imu_)?([xyz])_(?:axis_)?({'|'.join(n for n in _SENSORS if len(n) > 1)})"
    rf"(?:_([a-z0-9_]+))?"
)
_TIME = re.compile(
    r"(?:canonical_|component_|unix_|epoch_|sample_|elapsed_|device_|imu_)?"
    r"(timestamps?|time_stamp|time|ts|t|elapsed|seconds_elapsed|milliseconds|seconds)"
    r"(?:_([a-z]+))?"
)
_EGO4D_TIMES = ("canonical_timestamp_ms", "timestamp_ms", "component_timestamp_ms")
_IN_BRACKETS = re.compile(r"(.*?)\s*[(\[]\s*(.+?)\s*[)\]]\s*")

GRAVITY = 9.80665
ACCELEROMETER_UNITS = {
    **dict.fromkeys(("ms2", "mps2", "mss", "mpersec2"), 1.0),
    **dict.fromkeys(("g", "gs"), GRAVITY),
    "mg": GRAVITY / 1000,
}
"""Spelling of a unit without signs to its size in m/s^2."""
GYROSCOPE_UNITS = {
    **dict.fromkeys(("rads", "radps", "radpersec", "radsec"), 1.0),
    **dict.fromkeys(("degs", "dps", "degps", "degpersec", "degsec"), math.pi / 180),
    "mdps": math.pi / 180_000,
}
"""Spelling of a unit without signs to its size in rad/s."""
TIME_UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1000.0),
    **dict.fromkeys(("ms", "msec", "millis", "millisecond", "milliseconds"), 1.0),
    **dict.fromkeys(("us", "usec", "micros", "microsecond", "microseconds"), 1e-3),
    **dict.fromkeys(("ns", "nsec", "nanos", "nanosecond", "nanoseconds"), 1e-6),
}
"""Spelling of a unit to its size in milliseconds."""
UNITS = {
    "accelerometer": (ACCELEROMETER_UNITS, "m/s^2, g, mg"),
    "gyroscope": (GYROSCOPE_UNITS, "rad/s, deg/s, mdps"),
    "time": (TIME_UNITS, "s, ms, us, ns"),
}
"""What is measured to its units and how messages spell them."""


@dataclass(frozen=True)
class ImuColumns:
    """Where a table has what.

    Attributes:
        signal: numbers of the six columns, in the order of `CHANNELS`.
        scales: the size of each column's unit in m/s^2 or rad/s; None if the header does not say.
        time: number of the column of times; None if there is none.
        time_scale: the size of its unit in milliseconds; None if the header does not say.
        names: the header.
    """

    signal: tuple[int, ...]
    scales: tuple[float | None, ...]
    time: int | None
    time_scale: float | None
    names: tuple[str, ...]


def parse_unit(kind: str, text: str) -> float:
    """Return the size of a unit in m/s^2, rad/s or milliseconds.

    Args:
        kind: accelerometer, gyroscope or time.
        text: the unit, in any usual spelling: `m/s^2`, `m/s²`, `g`, `deg/s`, `dps`, `ms`.

    Raises:
        ValueError: the unit is not known.
    """
    plain = text.lower().replace("²", "2").replace("°", "deg").replace("µ", "u").replace("μ", "u")
    known, shown = UNITS[kind]
    scale = known.get(re.sub(r"[^a-z0-9]", "", plain))
    if scale is None:
        raise ValueError(f"the unit {text!r} of the {kind} is not known; known are {shown}")
    return scale


def find_columns(header: Sequence[str]) -> ImuColumns:
    """Find the six channels and the time by the usual names.

    Raises:
        ValueError: a channel has no column or several, or a unit is not known.
    """
    found: dict[str, tuple[int, float | None]] = {}
    times: list[tuple[int, float | None]] = []
    for number, cell in enumerate(header):
        name, unit = _split_unit(cell)
        channel = _match_channel(name, unit)
        if channel is not None:
            if channel[0] in found:
                other = header[found[channel[0]][0]]
                raise ValueError(
                    f"it has two columns for {channel[0]}, {other!r} and {cell!r}; keep one"
                )
            found[channel[0]] = number, channel[1]
        elif (matched := _TIME.fullmatch(name)) is not None:
            scale = _get_time_scale(matched, unit)
            if scale is not None or not (unit or matched[2]):
                times.append((number, scale))
    missing = [c for c in CHANNELS if c not in found]
    if missing:
        there = textwrap.shorten(", ".join(header), 200, placeholder=" ...") or "none"
        raise ValueError(f"it has no column for {', '.join(missing)}; its columns are {there}")
    time, time_scale = _choose_time(header, times)
    return ImuColumns(
        tuple(found[c][0] for c in CHANNELS),
        tuple(found[c][1] for c in CHANNELS),
        time,
        time_scale,
        tuple(header),
    )


def _split_unit(cell: str) -> tuple[str, str | None]:
    """`Acc X (m/s^2)` -> (`acc_x`, `m/s^2`)."""
    match = _IN_BRACKETS.fullmatch(cell)
    name, unit = (match[1], match[2]) if match else (cell, None)
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_"), unit


def _match_channel(name: str, unit: str | None) -> tuple[str, float | None] | None:
    """The channel that a column holds and the size of its unit; None: another column."""
    match = _AXIS_LAST.fullmatch(name)
    if match is not None:
        sensor, axis, suffix = match[1], match[2], match[3]
    elif (match := _AXIS_FIRST.fullmatch(name)) is not None:
        sensor, axis, suffix = match[2], match[1], match[3]
    else:
        return None
    kind = _SENSORS[sensor]
    if suffix is not None:
        scale = UNITS[kind][0].get(suffix.replace("_", ""))
        return None if scale is None else (f"{kind} {axis}", scale)
    return f"{kind} {axis}", None if unit is None else parse_unit(kind, unit)


def _get_time_scale(match: re.Match[str], unit: str | None) -> float | None:
    stated = unit or match[2] or {"seconds_elapsed": "s"}.get(match[1], match[1])
    return TIME_UNITS.get(stated.lower().replace("µ", "u").replace("μ", "u"))


def _choose_time(
    header: Sequence[str], times: Sequence[tuple[int, float | None]]
) -> tuple[int | None, float | None]:
    """Ego4D's columns in their order, then the first with a unit, then the first."""
    for wanted in _EGO4D_TIMES:
        for number, scale in times:
            if header[number].strip().lower() == wanted:
                return number, scale
    return next((t for t in times if t[1] is not None), times[0] if times else (None, None))
