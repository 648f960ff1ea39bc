"""Band-limited resampling in NumPy, with the filter of torchaudio 2.x `functional.resample`.

The filter is torchaudio's default, a sinc under a Hann window (`sinc_interp_hann`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_ZEROS = 6
"""Zero crossings on each side of the sinc (torchaudio: lowpass_filter_width)."""
_CACHED_PHASES = 1 << 16
"""Filters of more phases (times the ratio of the rates) are made anew: 100 MB for odd rates."""
_ROLLOFF = 0.99
"""Cut-off frequency as a fraction of the lower Nyquist frequency."""


def resample(signal: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resample along the last axis, in the signal's float type.

    The signal counts as zero outside its ends. Computed phase by phase, this gives torchaudio's
    numbers for every pair of rates without its kernel of target x rate / gcd^2 values.

    Args:
        signal: [..., N] at `rate` Hz.
        rate: Hz.
        target: Hz.

    Returns:
        [..., ceil(N * target / rate)].
    """
    if rate == target:
        return signal
    common = math.gcd(rate, target)
    down, up = rate // common, target // common
    is_small = up * max(1, down // up) <= _CACHED_PHASES  # of 44.1 kHz, but not of 1,000,003 Hz
    make_phases = _filter_phases if is_small else _filter_phases.__wrapped__
    taps = make_phases(down, up).astype(signal.dtype)
    reach, length = taps.shape[1] // 2 - 1, math.ceil(up * signal.shape[-1] / down)
    padded = np.pad(signal, [(0, 0)] * (signal.ndim - 1) + [(reach, taps.shape[1] + down)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps.shape[1], axis=-1)
    out = np.empty((*signal.shape[:-1], length), signal.dtype)
    for phase in range(min(up, length)):
        rows = windows[..., phase * down // up :: down, :][..., : (length - 1 - phase) // up + 1, :]
        out[..., phase::up] = np.ascontiguousarray(rows) @ taps[phase]
    return out


@lru_cache(maxsize=32)
def _filter_phases(down: int, up: int) -> np.ndarray:
    """[up, taps] fp64: the windowed sinc at each of the `up` positions between two inputs.

    Output p lies at input position p * down / up. Its first tap is for the input
    `taps // 2 - 1` positions before the floor of that.
    """
    cutoff = min(down, up) * _ROLLOFF
    reach = math.ceil(_ZEROS * down / cutoff)
    fraction = (np.arange(up) * down % up / up)[:, None]
    at = ((fraction - np.arange(-reach, reach + 2)) * (cutoff / down)).clip(-_ZEROS, _ZEROS)
    phases: np.ndarray = np.sinc(at) * np.cos(at * (math.pi / _ZEROS / 2)) ** 2 * (cutoff / down)
    return phases
