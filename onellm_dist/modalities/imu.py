"""Inertial measurements (IMU): accelerometer and gyroscope, 2 seconds at 200 Hz."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.drawing import draw_traces
from onellm_dist.modalities.io.damage import note_damage
from onellm_dist.modalities.io.imu import UNIT_KEYS, ImuFault, ImuRecording, read_recording
from onellm_dist.modalities.io.imu_columns import CHANNELS
from onellm_dist.modalities.io.imu_times import measure_gaps
from onellm_dist.modalities.limits import LIMITS
from onellm_dist.modalities.transforms.resample import resample

RATE = 200
"""Hz."""
SECONDS = 2
SAMPLES = RATE * SECONDS
_FEWEST = 10
"""Samples per window below which the reference gives up."""
_MARGIN_SECONDS = 4.0
"""How far the nearest sample may be from an edge of the window."""
_SLACK = 1.1
"""Factor by which a recording without a window may exceed 2 s; the rest is cut off."""
_CLOCK_MS = 1e9
"""Times from here on (11.6 days) are those of a clock; windows before it count from the start."""


@dataclass(frozen=True)
class ImuWindow:
    """The samples of one window, at the rate at which they were taken.

    Attributes:
        signal: [6, N] fp64: accelerometer x, y, z, gyroscope x, y, z.
        rate: samples per second.
    """

    signal: np.ndarray
    rate: int


class ImuTokenizer(nn.Module):
    """A 1-D convolution over 10 samples of the six channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, width, kernel_size=10, bias=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 6, 400] -> [n, 391, width]."""
        tokens: torch.Tensor = self.conv(values.to(self.conv.weight.dtype))
        return tokens.transpose(1, 2)


class ImuModality(Modality):
    """Two seconds of accelerometer and gyroscope.

    | | |
    |---|---|
    | files | `imu`: imu.npy, npy ([6, N] or [N, 6]), imu.csv, csv (with a header) |
    | | `timestamps`, optional: timestamps.npy, imu_timestamps.npy ([N] in milliseconds) |
    | | `window`, optional: window.json (see below) |
    | raw signal | `ImuWindow`: [6, N] fp64, accelerometer x, y, z, then gyroscope x, y, z |
    | model input | [6, 400]: 200 Hz, in m/s^2 and rad/s; nothing is normalised |
    | encoder tokens | 391 and the class token |

    *Columns of a CSV.* Accelerometer: `accl_x`, `accel_x`, `acc_x`, `ax`, `accelerometer_x`,
    `acceleration_x`, `linear_acceleration.x`. Gyroscope: `gyro_x`, `gyr_x`, `gx`, `wx`,
    `gyroscope_x`, `angular_velocity.x`, `rotation_rate_x`. Time: `canonical_timestamp_ms`,
    `timestamp_ms`, `component_timestamp_ms`, or `time`, `timestamp`, `ts`, `t`, `elapsed` with or
    without a unit (`time_s`, `timestamp_ns`). Capitals do not matter, and space, dot, hyphen or
    nothing may stand for the underscore. Comma, semicolon, tab or bar separate the columns.

    *Units.* The model learns from the numbers as they are, so they must be m/s^2 and rad/s. A
    column may name its unit, `ax (g)`, `accl_x_mg` or `gyro_x [deg/s]`, or the sample's json may:
    `{"accel_unit": "g", "gyro_unit": "deg/s", "time_unit": "s"}`. For a whole build,
    `-o describe=accel_unit=g,time_unit=s` says so. The signal is then converted; known are m/s^2,
    g, mg; rad/s, deg/s, mdps; s, ms, us, ns. Without a unit, m/s^2 and rad/s are assumed. What
    cannot be in its unit, stated or assumed, is refused: an accelerometer at rest that would read
    right in another one, one that exceeds 20 g half of the time, or a gyroscope beyond 50 rad/s.
    (A NumPy file in g looks like one of gentle motion in m/s^2: state its unit.)

    *Times.* A time without a unit is in the one that makes 5 to 5000 samples per second; there is
    only one, unless samples come in bursts: these need a stated unit. A stated unit that makes
    another rate is refused: seconds under `timestamp_ms` do not become milliseconds. Times in
    `timestamps.npy` are in milliseconds, and in another unit only if milliseconds cannot be.

    *Two seconds.* A recording with times is cut to the window that the sample's json gives:
    `{"window_start": 1.0, "window_end": 3.0}`, in seconds, 2 s apart. `onellm generate` reads them
    from `<stem>.window.json`. Without a window the recording itself must last about 2 s. A
    recording without times must be at 200 Hz. Where times are those of a clock (since 1970, say),
    windows that begin earlier count from the start of the recording.

    *Faults.* A row that cannot be read, NaN, or a time that runs backwards costs the windows around
    it. If more than a quarter of the samples are out of order, the recording is refused. Where the
    times jump (over 0.1 s, and over the rhythm of a sensor that hands over bursts), nothing was
    measured: a window with gaps of more than a quarter is refused. Shorter gaps are noted, and so
    are missing samples at the ends of a window, which are filled with zeros.
    """

    name = "imu"
    order = 6
    limits = LIMITS["imu"]
    meta_keys = UNIT_KEYS
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "imu": ("imu.npy", "imu.csv", "npy", "csv")
    }
    optional_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "timestamps": ("timestamps.npy", "imu_timestamps.npy"),
        "window": ("window.json",),
    }
    value_shape = (len(CHANNELS), SAMPLES)
    tokens = 391

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> ImuWindow:
        """Read the samples of the window."""
        if "window" in parts:
            meta = {**meta, **_read_window(parts["window"])}
        recording = read_recording(parts["imu"], parts.get("timestamps"), meta)
        if recording.times is None:
            return _use_all(recording, RATE)
        if "window_start" not in meta and "window_end" not in meta:
            whole = _use_all(recording, _compute_mean_rate(recording.times))
            if len(recording.times):
                ends = recording.times[0], recording.times[-1]
                _note_gaps("the recording", recording.times, *ends)
            return whole
        return cut_window(recording, recording.times, meta)

    def transform(self, raw: ImuWindow, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[6, 400]: resampled to 200 Hz, cut or filled with zeros at the end; not normalised."""
        if raw.signal.shape[1] < _FEWEST:
            raise SampleError(
                f"a window of {raw.signal.shape[1]} samples",
                f"at least {_FEWEST} are needed, as in the reference.",
                "drop the sample; its recording has a gap there.",
            )
        signal = resample(raw.signal, raw.rate, RATE)[:, :SAMPLES]
        out = torch.zeros(self.value_shape)
        with np.errstate(over="ignore"):  # what overflows is refused below
            out[:, : signal.shape[1]] = torch.from_numpy(signal.astype(np.float32))
        if not torch.isfinite(out).all():
            raise SampleError(
                "the signal is too large for fp32",
                "it would make the gradients of the whole step NaN.",
                "store it in m/s^2 and rad/s.",
            )
        return out

    def build_tokenizer(self, width: int) -> nn.Module:
        """Build a 1-D convolution over time."""
        return ImuTokenizer(width)

    def preview(self, raw: ImuWindow) -> Image.Image:
        """Accelerometer above, gyroscope below, x red, y green, z blue, 448 x 224."""
        return _draw_signal(raw.signal)

    def draw_value(self, value: torch.Tensor) -> Image.Image:
        """Draw the two seconds at 200 Hz as `preview` draws a raw window."""
        return _draw_signal(value.numpy())


def _draw_signal(signal: np.ndarray) -> Image.Image:
    return draw_traces([("accelerometer", signal[:3]), ("gyroscope", signal[3:])])


def _read_window(part: Part) -> Mapping[str, Any]:
    try:
        window = json.loads(part.data)
    except ValueError as error:
        raise SampleError(
            f".{part.extension} is not JSON: {error}",
            "the window of the recording is unknown.",
            'write {"window_start": 1.0, "window_end": 3.0} (seconds).',
        ) from error
    return window if isinstance(window, dict) else {}


def _compute_mean_rate(times: np.ndarray) -> int:
    """Hz, rounded down as in the reference; 0 if it cannot be computed."""
    step = float(np.diff(times).mean()) if len(times) > 1 else 0.0
    return int(1000 * (1 / step)) if step > 0 else 0


def _use_all(recording: ImuRecording, rate: int) -> ImuWindow:
    """The recording itself as the window.

    Raises:
        SampleError: it is much longer than 2 s, has a fault, or its rate is unknown.
    """
    signal = recording.signal
    if recording.faults:
        raise _fault_error("the recording", recording.faults)
    if rate < 1 or signal.shape[1] > SAMPLES * rate / RATE * _SLACK:
        raise SampleError(
            f"a recording of {signal.shape[1]} samples at {rate} Hz, and no window to cut from it",
            f"the tokenizer takes {SECONDS} s, and nothing says which.",
            "add window_start and window_end (seconds) to the sample's json, and the timestamps.",
        )
    return ImuWindow(signal, rate)


def cut_window(recording: ImuRecording, times: np.ndarray, meta: Mapping[str, Any]) -> ImuWindow:
    """Cut out the samples in [window_start, window_end).

    Args:
        recording: the whole recording.
        times: [N] in milliseconds, the recording's.
        meta: `window_start` and `window_end` in seconds.

    Raises:
        SampleError: the window is not 2 s long, or the recording has too few samples there.
    """
    start, end = (_get_seconds(meta, key) for key in ("window_start", "window_end"))
    shift = 0.0
    if len(times) and times[0] >= _CLOCK_MS > max(start, end) * 1000:
        shift = float(times[0])
        times = times - shift
    if round(end - start) != SECONDS:
        raise _window_error(f"the window {start:g} to {end:g} s is not {SECONDS} s long")
    if not len(times):
        raise _window_error("the recording has no samples")
    if max(start, end) * 1000 > times[-1]:
        raise _window_error(
            f"the window {start:g} to {end:g} s reaches beyond the recording's end "
            f"at {times[-1] / 1000:g} s"
        )
    first, last = bisect_left(times, start * 1000), bisect_left(times, end * 1000)
    gap = max(abs(start - times[first] / 1000), abs(end - times[last] / 1000))
    if gap > _MARGIN_SECONDS:
        raise _window_error(
            f"the sample nearest to an edge of the window {start:g} to {end:g} s "
            f"is {gap:.1f} s away"
        )
    faults = [
        f
        for f in recording.faults
        if f.start - shift < end * 1000 and f.end - shift >= start * 1000
    ]
    if faults:
        raise _fault_error(f"the window {start:g} to {end:g} s", faults)
    if last - first < _FEWEST:
        raise _window_error(f"the window {start:g} to {end:g} s has {last - first} samples")
    rate = _compute_mean_rate(times[first:last])
    if rate < 1:
        raise _window_error(
            f"the samples of the window {start:g} to {end:g} s all have the same time"
        )
    _note_gaps(f"the window {start:g} to {end:g} s", times[first:last], start * 1000, end * 1000)
    return ImuWindow(recording.signal[:, first:last], rate)


def _note_gaps(what: str, times: np.ndarray, start: float, end: float) -> None:
    """Note how much of a window was not measured.

    Samples on both sides of a gap are stretched over it, so that a long one is refused; what is
    missing at the ends is filled with zeros, as in the reference.

    Args:
        what: what errors call it.
        times: [M] of its samples, in milliseconds.
        start: its beginning in milliseconds.
        end: its end in milliseconds.

    Raises:
        SampleError: the gaps are too long.
    """
    between, ends = measure_gaps(times, start, end)
    if between:
        shown = f"{between / 1000:.2g} s of its {(end - start) / 1000:.2g} s have no samples"
        note_damage(f"{what} has gaps: {shown}", between / (SECONDS * 1000))
    if ends:
        note_damage(f"{what}: {ends / 1000:.2g} s at its ends have no samples", 0.0)


def _get_seconds(meta: Mapping[str, Any], key: str) -> float:
    value = meta.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise _window_error(f"{key} is {value!r}, not a number of seconds")
    return float(value)


def _fault_error(what: str, faults: Sequence[ImuFault]) -> SampleError:
    others = len(faults) - 1
    more = f" (and {format_count(others, 'more fault')})" if others else ""
    return SampleError(
        f"{what} has a fault: {faults[0].what}{more}",
        "what the sensor measured there is not known.",
        "drop the sample, or choose another window; those without a fault are usable.",
    )


def _window_error(what: str) -> SampleError:
    return SampleError(
        what,
        "there is no signal to train on.",
        "drop the sample, or correct the window in its json.",
    )


MODALITY = ImuModality()
