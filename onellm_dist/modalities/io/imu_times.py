"""Times of inertial recordings: their unit, and the places where they do not ascend."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from onellm_dist.modalities.io.imu_columns import TIME_UNITS

PLAUSIBLE_HZ = (5.0, 5000.0)
"""Rates of inertial sensors; the second is exclusive.

Windows need 5 Hz (10 samples in 2 s), and the units of time are a factor of 1000 apart: for any
recording exactly one unit gives a rate in this range."""
_STRETCH = 1000
"""Samples over which the mean distance is taken, at most; bursts are much shorter."""
_SHOWN = ("s", "ms", "us", "ns")
_SHORTEST_GAP = 100.0
"""Milliseconds up to which nothing is called a gap."""
_FEW = 3
"""Steps as long as this many others are the rhythm of bursts, and no gaps, ..."""
_IN_BURSTS = 0.1
"""... where the samples between them take no more than this share of the time."""


def scale_times(times: np.ndarray, scale: float | None, usual: float | None = None) -> np.ndarray:
    """Bring times to milliseconds.

    Args:
        times: [N] fp64; values that are not finite are passed over.
        scale: the size of their unit in milliseconds, if the file states it.
        usual: the unit to prefer where the file does not state one.

    Returns:
        [N] fp64 in milliseconds.

    Raises:
        ValueError: no unit gives a plausible rate, or several do, or the stated one does not.
    """
    steps = _list_typical_steps(times)
    if not steps:
        return times * (scale or usual or 1.0)
    if scale is not None:
        if not any(_is_plausible(step * scale) for step in steps):
            raise ValueError(
                f"its times are stated in {_get_name(scale)}, which makes "
                f"{1000 / (steps[-1] * scale):.6g} samples a second{_suggest(steps[-1], scale)}"
            )
        return times * scale
    fitting = {
        TIME_UNITS[n]: n for n in _SHOWN if any(_is_plausible(s * TIME_UNITS[n]) for s in steps)
    }
    if usual in fitting:
        return times * usual
    if not fitting:
        raise ValueError(
            f"its times are {steps[0]:.6g} apart: in no unit from s to ns are these the "
            f"{PLAUSIBLE_HZ[0]:g} to {PLAUSIBLE_HZ[1]:g} samples a second of an inertial sensor"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"its samples come in bursts: neighbours are {steps[0]:.6g} apart, and on average "
            f"{steps[-1]:.6g}, so that its times may be in {' or '.join(fitting.values())}: name "
            f"the unit in the column, as in 'timestamp_ms', or set time_unit"
        )
    return times * next(iter(fitting))


def _list_typical_steps(times: np.ndarray) -> list[float]:
    """Distances of samples: the median one, and the mean of a stretch; those above 0.

    Where samples come in bursts the median is the distance within a burst. The mean is that of the
    typical stretch: one gap or one wrong time does not change it. The mean of the whole recording
    stands in where neither is above 0.
    """
    finite = times[np.isfinite(times)]
    if len(finite) < 2:
        return []
    length = max(1, min(len(finite) // 4, _STRETCH))
    median = float(np.median(np.diff(finite)))
    mean = float(np.median(finite[length:] - finite[:-length])) / length
    whole = float(finite[-1] - finite[0]) / (len(finite) - 1)
    return [s for s in (median, mean) if s > 0] or [s for s in (whole,) if s > 0]


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


def measure_gaps(times: np.ndarray, start: float, end: float) -> tuple[float, float]:
    """Measure how long nothing was measured between two moments.

    Args:
        times: [M] ascending, in milliseconds, from `start` on and before `end`; M > 0.
        start: the first moment in milliseconds.
        end: the last moment.

    Returns:
        Milliseconds without samples between the samples, and at the two ends; 0: no gap.
    """
    steps = np.diff(times)
    usual = float(np.median(steps)) if len(steps) else 0.0
    between = steps > 10 * usual
    # A sensor that hands over bursts gives all samples of one nearly the same time.
    in_bursts = between.sum() >= _FEW and steps[~between].sum() <= _IN_BURSTS * steps.sum()
    rhythm = float(np.sort(steps)[-_FEW]) if in_bursts else 0.0
    longest = max(_SHORTEST_GAP, 3 * usual, 2 * rhythm)
    ends = np.array([times[0] - start, end - times[-1]])
    return float(steps[steps > longest].sum()), float(ends[ends > longest].sum())
