"""Inertial measurements: accelerometer and gyroscope, 2 seconds at 200 Hz."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.drawing import traces
from onellm_dist.modalities.io.imu import CHANNELS, Recording, read_recording
from onellm_dist.modalities.io.resample import resample

RATE = 200
SECONDS = 2
SAMPLES = RATE * SECONDS
_FEWEST = 10
"""Samples of a window below which the reference gives it up."""
_MARGIN_SECONDS = 4.0
"""How far the nearest sample may be from a window's edge."""
_SLACK = 1.1
"""How much longer than 2 s a recording without a window may be (it is cut)."""


@dataclass(frozen=True)
class Window:
    """The samples of one window, at the rate they were taken: `signal` [6, N] fp64, `rate` in Hz."""

    signal: np.ndarray
    rate: int


class ImuTokenizer(nn.Module):
    """A 1-D convolution of 10 samples over the six channels: [n, 6, 400] -> [n, 391, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, width, kernel_size=10, bias=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 6, 400] -> [n, 391, width]."""
        return self.conv(values.to(self.conv.weight.dtype)).transpose(1, 2)


class ImuModality(Modality):
    """Two seconds of accelerometer and gyroscope. The raw signal is a `Window`.

    A recording with timestamps (part `timestamps`, or a column of the CSV) is cut to the window that the sample's json
    gives: `window_start` and `window_end` in seconds, 2 s apart. `onellm generate` reads them from `<stem>.window.json`.
    Without a window the recording itself must last about 2 s; without timestamps it must be at 200 Hz.
    """

    name = "imu"
    order = 6
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "imu": ("imu.npy", "imu.csv", "npy", "csv")
    }
    optional_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "timestamps": ("timestamps.npy", "imu_timestamps.npy"),
        "window": ("window.json",),
    }
    value_shape = (len(CHANNELS), SAMPLES)
    tokens = 391

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Window:
        """The samples of the window."""
        recording = read_recording(parts["imu"], parts.get("timestamps"))
        if recording.times is None:
            return _whole(recording.signal, RATE)
        if "window" in parts:
            meta = _read_window(parts["window"])
        if "window_start" not in meta and "window_end" not in meta:
            return _whole(recording.signal, _mean_rate(recording.times))
        return cut_window(recording, recording.times, meta)

    def transform(self, raw: Window, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[6, 400]: resampled to 200 Hz, cut or filled with zeros at the end. Nothing is normalised."""
        if raw.signal.shape[1] < _FEWEST:
            raise SampleError(
                f"a window of {raw.signal.shape[1]} samples",
                f"the reference gives up below {_FEWEST}.",
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
                "give it in m/s^2 and rad/s.",
            )
        return out

    def tokenizer(self, width: int) -> nn.Module:
        """A 1-D convolution over time."""
        return ImuTokenizer(width)

    def preview(self, raw: Window) -> Image.Image:
        """Accelerometer above, gyroscope below, x red, y green, z blue, 448 x 224."""
        return traces([("accelerometer", raw.signal[:3]), ("gyroscope", raw.signal[3:])])


def _read_window(part: Part) -> Mapping[str, Any]:
    try:
        window = json.loads(part.data)
    except ValueError as error:
        raise SampleError(
            f".{part.extension} is no JSON: {error}",
            "the window of the recording is not known.",
            'write {"window_start": 1.0, "window_end": 3.0} (seconds).',
        ) from error
    return window if isinstance(window, dict) else {}


def _mean_rate(times: np.ndarray) -> int:
    """Hz, rounded down as the reference does; 0 where it cannot be told."""
    step = float(np.diff(times).mean()) if len(times) > 1 else 0.0
    return int(1000 * (1 / step)) if step > 0 else 0


def _whole(signal: np.ndarray, rate: int) -> Window:
    if rate < 1 or signal.shape[1] > SAMPLES * rate / RATE * _SLACK:
        raise SampleError(
            f"a recording of {signal.shape[1]} samples at {rate} Hz and no window to cut out of it",
            f"the tokenizer takes {SECONDS} s, and which ones is not said.",
            "give window_start and window_end (seconds) in the sample's json, and the timestamps.",
        )
    return Window(signal, rate)


def cut_window(recording: Recording, times: np.ndarray, meta: Mapping[str, Any]) -> Window:
    """The samples in [window_start, window_end), which `meta` gives in seconds.

    Args:
        times: [N] in ms, the recording's.

    Raises:
        SampleError: no window of 2 s, or the recording has too few samples there.
    """
    start, end = (_seconds(meta, key) for key in ("window_start", "window_end"))
    if round(end - start) != SECONDS:
        raise _bad_window(f"the window {start:g} to {end:g} s is not {SECONDS} s long")
    if max(start, end) * 1000 > times[-1]:
        raise _bad_window(
            f"the window {start:g} to {end:g} s reaches beyond the recording's end at {times[-1] / 1000:g} s"
        )
    first, last = bisect_left(times, start * 1000), bisect_left(times, end * 1000)
    gap = max(abs(start - times[first] / 1000), abs(end - times[last] / 1000))
    if gap > _MARGIN_SECONDS:
        raise _bad_window(
            f"the sample nearest to an edge of the window {start:g} to {end:g} s is {gap:.1f} s away"
        )
    if last - first < _FEWEST:
        raise _bad_window(f"the window {start:g} to {end:g} s has {last - first} samples")
    rate = _mean_rate(times[first:last])
    if rate < 1:
        raise _bad_window(f"the samples of the window {start:g} to {end:g} s all have one time")
    return Window(recording.signal[:, first:last], rate)


def _seconds(meta: Mapping[str, Any], key: str) -> float:
    value = meta.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise _bad_window(f"{key} is {value!r}, not a number of seconds")
    return float(value)


def _bad_window(what: str) -> SampleError:
    return SampleError(
        what,
        "there is no signal to train on.",
        "drop the sample, or correct the window in its json.",
    )


MODALITY = ImuModality()
