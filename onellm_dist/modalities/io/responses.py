"""Brain responses that were measured several times."""

from __future__ import annotations

import numpy as np

from onellm_dist.modalities.io.arrays import require_finite
from onellm_dist.modalities.io.damage import note_damage


def average_repetitions(array: np.ndarray, name: str, scale: float = 1.0) -> np.ndarray:
    """Average over repetitions in fp64.

    Repetitions with values that are not finite are left out and noted as damage.

    Args:
        array: [voxels] or [repetitions, voxels], any numbers, not empty.
        name: what messages call the array.
        scale: what the values are divided by.

    Returns:
        [voxels] fp32.

    Raises:
        SampleError: no repetition is good, or the mean is too large for fp32.
    """
    rows = array.reshape(-1, array.shape[-1])
    good = np.isfinite(rows).all(1)
    if not good.any():
        require_finite(array, name)
    if not good.all():
        note_damage(
            f"{name}: {(~good).sum()} of {len(rows)} repetitions have values that are not finite",
            0.0,  # the mean over the others has every voxel
        )
        rows = rows[good]
    with np.errstate(over="ignore"):
        mean: np.ndarray = (rows.mean(0, dtype=np.float64) / scale).astype(np.float32)
    require_finite(mean, f"{name} (in fp32)")
    return mean


def holds_whole_numbers(array: np.ndarray) -> bool:
    """Whether all finite values are whole numbers, and not all 0: no measured response is."""
    if array.dtype.kind != "f":
        return True
    finite = array[np.isfinite(array)]
    return bool(np.any(finite) and np.all(finite == np.round(finite)))
