"""Band-limited resampling with torchaudio's filter (`functional.resample` of torchaudio 2.x, `sinc_interp_hann`), by SciPy."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_ZEROS = 6
"""Zero crossings on each side of the sinc (torchaudio: lowpass_filter_width)."""
_ROLLOFF = 0.99
"""Cut-off as a fraction of the lower Nyquist frequency."""


@lru_cache(maxsize=64)
def _filter(down: int, up: int) -> tuple[np.ndarray, int]:
    """The Hann-windowed sinc on the common grid of both rates, [2 * half + 1] fp64, and `half`."""
    cutoff = min(down, up) * _ROLLOFF
    half = math.ceil(_ZEROS * down / cutoff) * up
    at = np.clip(np.arange(-half, half + 1) * (cutoff / (down * up)), -_ZEROS, _ZEROS)
    return np.sinc(at) * np.cos(at * (math.pi / _ZEROS / 2)) ** 2 * (cutoff / down), half


def resample(signal: np.ndarray, rate: int, target: int) -> np.ndarray:
    """[..., N] at `rate` Hz -> [..., ceil(N * target / rate)] at `target` Hz, in the signal's float type.

    The signal is taken as zero outside itself. The polyphase form (`scipy.signal.upfirdn`) gives torchaudio's numbers for
    every pair of rates, without its kernel of target x rate / gcd^2 values.
    """
    if rate == target:
        return signal
    from scipy.signal import upfirdn  # its import takes half a second, and most samples need none

    divisor = math.gcd(rate, target)
    down, up = rate // divisor, target // divisor
    taps, half = _filter(down, up)
    lead = -half % down  # so that the filter's centre meets the grid of the output
    length = math.ceil(up * signal.shape[-1] / down)
    full = upfirdn(np.concatenate([np.zeros(lead), taps]).astype(signal.dtype), signal, up, down, axis=-1)
    start = (half + lead) // down
    return full[..., start : start + length]
