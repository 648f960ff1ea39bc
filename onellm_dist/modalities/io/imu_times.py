"""Times of inertial recordings: their unit, and the places where they do not ascend."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from onellm_dist.modalities.io.imu_columns import TIME_UNITS

PLAUSIBLE_HZ = (5.0, 5000.0)
"""Rates of inertial sensors; the second is exclusive.

Windows need 5 Hz (10 samples in 2 s), and the units of time are a factor of 1000 apart: for any
recording exactly one unit gives a rate in this range."""
_SHOWN = ("s", "ms", "us", "ns")


def scale_times(times: np.ndarray, scale: float | None, usual: float | None = None) -> np.ndarray:
    """Bring times to milliseconds.

    Args:
        times: [N] fp64; values that are not finite are passed over.
        scale: the size of their unit in milliseconds, if the file states it.
        usual: the unit to prefer where the file does not state one.

    Returns:
        [N] fp64 in milliseconds.

    Raises:
        ValueError: no unit gives a plausible rate, or the stated one does not.
    """
    step = _get_typical_step(times)
    if step <= 0:
        return times * (scale or usual or 1.0)
    if scale is not None:
        if not _is_plausible(step * scale):
            raise ValueError(
                f"its times are stated in {_get_name(scale)}, which makes "
                f"{1000 / (step * scale):.6g} samples a second{_suggest(step, scale)}"
            )
        return times * scale
    fitting = [u for u in (TIME_UNITS[n] for n in _SHOWN) if _is_plausible(step * u)]
    chosen = usual if usual in fitting else next(iter(fitting), None)
    if chosen is None:
        raise ValueError(
            f"its times are {step:.6g} apart: in no unit from s to ns are these the "
            f"{PLAUSIBLE_HZ[0]:g} to {PLAUSIBLE_HZ[1]:g} samples a second of an inertial sensor"
        )
    return times * chosen


def _get_typical_step(times: np.ndarray) -> float:
    """Median distance of neighbours; their mean where most have none (0 if that is unknown)."""
    finite = times[np.isfinite(times)]
    if len(finite) < 2:
        return 0.0
    median = float(np.median(np.diff(finite)))
    return median if median > 0 else float(finite[-1] - finite[0]) / (len(finite) - 1)


def _is_plausible(step_ms: float) -> bool:
    return PLAUSIBLE_HZ[0] <= 1000 / step_ms < PLAUSIBLE_HZ[1] if step_ms > 0 else False


def _get_name(scale: float) -> str:
    return next(n for n in _SHOWN if TIME_UNITS[n] == scale)


def _suggest(step: float, scale: float) -> str:
    for name in _SHOWN:
        if TIME_UNITS[name] != scale and _is_plausible(step * TIME_UNITS[name]):
            return f"; in {name} it would be {1000 / (step * TIME_UNITS[name]):.6g}"
    return ""


def find_ascending(times: np.ndarray) -> np.ndarray:
    """Find the samples to keep so that times never fall, dropping as few as possible.

    Args:
        times: [N] fp64; values that are not finite are dropped.

    Returns:
        [N] bool: the longest subsequence that never falls.
    """
    kept: np.ndarray = np.isfinite(times)
    values = times[kept]
    if not (np.diff(values) < 0).any():
        return kept
    ends: list[float] = []
    """ends[k]: the smallest last value of a subsequence of k + 1 values."""
    holders: list[int] = []
    before = np.full(len(values), -1, np.int64)
    for i, value in enumerate(values.tolist()):
        at = bisect_right(ends, value)
        before[i] = holders[at - 1] if at else -1
        if at == len(ends):
            ends.append(value)
            holders.append(i)
        else:
            ends[at], holders[at] = value, i
    chosen = np.zeros(len(values), bool)
    i = holders[-1]
    while i >= 0:
        chosen[i] = True
        i = int(before[i])
    out = np.zeros(len(times), bool)
    out[np.flatnonzero(kept)[chosen]] = True
    return out
