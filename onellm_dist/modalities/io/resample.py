"""Band-limited resampling with torchaudio's filter (`functional.resample` of torchaudio 2.x, `sinc_interp_hann`), in NumPy."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_ZEROS = 6
"""Zero crossings on each side of the sinc (torchaudio: lowpass_filter_width)."""
_ROLLOFF = 0.99
"""Cut-off as a fraction of the lower Nyquist frequency."""


@lru_cache(maxsize=32)
def _phases(down: int, up: int) -> np.ndarray:
    """[up, taps] fp64: the Hann-windowed sinc as seen from each of the `up` places an output may have between two inputs.

    Output p lies at input position p * down / up; its first tap is for the input `taps // 2 - 1` places before the floor of that.
    """
    cutoff = min(down, up) * _ROLLOFF
    reach = math.ceil(_ZEROS * down / cutoff)
    fraction = (np.arange(up) * down % up / up)[:, None]
    at = ((fraction - np.arange(-reach, reach + 2)) * (cutoff / down)).clip(-_ZEROS, _ZEROS)
    return np.sinc(at) * np.cos(at * (math.pi / _ZEROS / 2)) ** 2 * (cutoff / down)


def resample(signal: np.ndarray, rate: int, target: int) -> np.ndarray:
    """[..., N] at `rate` Hz -> [..., ceil(N * target / rate)] at `target` Hz, in the signal's float type.

    The signal is taken as zero outside itself. Phase by phase it gives torchaudio's numbers for every pair of rates, without
    its kernel of target x rate / gcd^2 values.
    """
    if rate == target:
        return signal
    divisor = math.gcd(rate, target)
    down, up = rate // divisor, target // divisor
    taps = _phases(down, up).astype(signal.dtype)
    reach, length = taps.shape[1] // 2 - 1, math.ceil(up * signal.shape[-1] / down)
    padded = np.pad(signal, [(0, 0)] * (signal.ndim - 1) + [(reach, taps.shape[1] + down)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps.shape[1], axis=-1)
    out = np.empty((*signal.shape[:-1], length), signal.dtype)
    for phase in range(min(up, length)):
        rows = windows[..., phase * down // up :: down, :][..., : (length - 1 - phase) // up + 1, :]
        out[..., phase::up] = np.ascontiguousarray(rows) @ taps[phase]
    return out
