"""Reading `.npy` bytes without trusting them.

Pickles are refused, and nothing is allocated from a header alone.
"""

from __future__ import annotations

import io

import numpy as np

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.library_faults import require_library


def is_npy(part: Part) -> bool:
    """Check for a file of `numpy.save`, by its first bytes."""
    return part.data[:6] == b"\x93NUMPY"


def read_npy(part: Part, *, finite: bool = True) -> np.ndarray:
    """Read a numeric array; it is read-only, because it views the part's bytes.

    Args:
        part: the file.
        finite: whether to refuse NaN and infinities.

    Raises:
        SampleError: the bytes are not `.npy`, are cut short, hold objects or text, or (if `finite`)
            values that are not finite.
    """
    stream = io.BytesIO(part.data)
    try:
        version = np.lib.format.read_magic(stream)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = header(stream)
        count = int(np.prod(shape, dtype=object)) if shape else 1
        following = len(part.data) - stream.tell()
        if dtype.kind not in "fiu":
            raise ValueError(f"its values are of type {dtype}, not numbers")
        if count * dtype.itemsize != following:
            raise ValueError(
                f"its header says {shape} {dtype}, which is not the {following} bytes that follow"
            )
        flat = np.frombuffer(part.data, dtype, count, stream.tell())
        array = flat.reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # numpy parses the header as Python: broken bytes raise anything
        require_library(error)
        raise SampleError(
            f".{part.extension} ({len(part.data)} bytes) is not a readable NumPy array: "
            f"{error or type(error).__name__}",
            "the sample has no usable signal.",
            "write it again with numpy.save, as plain numbers (allow_pickle=False).",
        ) from error
    if finite:
        require_finite(array, f".{part.extension}")
    return array


def require_finite(array: np.ndarray, name: str) -> None:
    """Refuse NaN and infinities.

    Args:
        array: any numbers.
        name: what the error calls the array.

    Raises:
        SampleError: `array` has a value that is not finite.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        raise SampleError(
            f"{name} has {len(bad)} values that are not finite, the first at index "
            f"{tuple(int(i) for i in bad[0])} of {array.shape}",
            "one NaN in an input makes the gradients of the whole step NaN.",
            "repair or drop the sample where it is made.",
        )
