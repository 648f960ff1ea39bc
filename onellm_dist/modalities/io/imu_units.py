"""Whether inertial measurements can be in the units that are stated or assumed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onellm_dist.modalities.io.imu_columns import GRAVITY

_STILL = 0.1
"""At rest, 90% of the accelerations are gravity within this share."""
_OTHER_UNITS = {"m/s^2": 1.0, "g": GRAVITY, "mg": GRAVITY / 1000}
_STRONGEST = 200.0
"""m/s^2 that half of a recording's samples do not exceed: 20 g."""
_FASTEST = 50.0
"""rad/s that 99% of the samples do not exceed: usual gyroscopes end at 2000 deg/s, 35 rad/s."""


def check_units(
    signal: np.ndarray, scales: Sequence[float | None], *, is_raw: bool = False
) -> None:
    """Check that numbers can be in their units: the stated ones, else m/s^2 and rad/s.

    Args:
        signal: [6, N] as it is stored.
        scales: the size of each channel's unit; None where none is stated.
        is_raw: whether the file is an array, whose numbers are the model's input as they are. Where
            no unit is stated, gravity may be 1 in it (the toy world's recordings are in g).

    Raises:
        ValueError: they look like another unit.
    """
    if len(set(scales[:3])) == 1:
        _check_accelerometer(_get_sizes(signal[:3]), scales[0], is_raw=is_raw)
    if len(set(scales[3:])) == 1:
        _check_gyroscope(_get_sizes(signal[3:]), scales[3])


def _check_accelerometer(size: np.ndarray, stated: float | None, *, is_raw: bool) -> None:
    if not len(size):
        return
    scale = stated or 1.0
    unit = next(name for name, known in _OTHER_UNITS.items() if known == scale)
    typical = float(np.median(size))
    low, high = np.percentile(size, (5, 95))
    is_known = stated is not None or not is_raw
    if is_known and typical > 0 and low > (1 - _STILL) * typical and high < (1 + _STILL) * typical:
        for other, known in _OTHER_UNITS.items():
            if known != scale and abs(typical * known / GRAVITY - 1) < _STILL:
                raise ValueError(
                    f"its accelerometer reads {typical:.3g} all the time, which is gravity in "
                    f"{other} and not in {unit}: name the unit, as in 'accl_x ({other})', or set "
                    f"accel_unit"
                )
    if typical * scale > _STRONGEST:
        raise ValueError(
            f"half of its accelerations exceed {_STRONGEST / scale:g} {unit}: name their unit, as "
            f"in 'accl_x ({'mg' if unit != 'mg' else 'm/s^2'})', or set accel_unit"
        )


def _check_gyroscope(size: np.ndarray, stated: float | None) -> None:
    if len(size) and np.percentile(size, 99) * (stated or 1.0) > _FASTEST:
        said = "rad/s" if stated is None else f"its unit ({size.max() * stated:.4g} rad/s)"
        raise ValueError(
            f"its gyroscope reads up to {size.max():.4g}, which is too fast for {said}: name the "
            f"unit, as in 'gyro_x (deg/s)', or set gyro_unit"
        )


def _get_sizes(vectors: np.ndarray) -> np.ndarray:
    """[M]: lengths of the finite ones of the vectors [3, N]."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths: np.ndarray = np.sqrt((vectors**2).sum(0))
    finite: np.ndarray = lengths[np.isfinite(lengths)]
    return finite
