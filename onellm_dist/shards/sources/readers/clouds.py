"""Point clouds that torch.save wrote, as `.npy`.

Cap3D's `.pt` files are tensors [6, 16384]: x, y, z, red, green, blue.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.modalities.limits import LIMITS, check_count
from onellm_dist.shards.sources.base import BadSampleError, Media
from onellm_dist.shards.sources.readers.tensor_files import read_tensor


@dataclass(frozen=True)
class TensorCloud:
    """A `.pt` cloud as `.npy` [N, 6] fp32."""

    source: Media
    where: str
    """Name of the cloud in messages."""

    def read_bytes(self) -> bytes:
        """Return the `.npy` file.

        Raises:
            BadSampleError: the file is not a tensor (pickled code is never run), or has another
                shape or type of numbers.
        """
        data = self.source.read_bytes()
        with decoding():
            return self._convert(data)

    def _convert(self, data: bytes) -> bytes:
        try:
            value = read_tensor(data)
        except (MemoryError, OneLLMError):
            raise
        except Exception as error:  # broken pickles and zips raise nearly anything
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadSampleError(f"unreadable .pt: {self.where}: {first[:200]}") from error
        if not isinstance(value, np.ndarray):
            raise BadSampleError(
                f"wrong type: {self.where} holds a {type(value).__name__}, not a tensor"
            )
        if not (value.dtype.kind == "f" or value.dtype == np.uint8):
            raise BadSampleError(
                f"wrong type: {self.where} holds {value.dtype}, not floating-point numbers"
            )
        if value.ndim != 2 or 6 not in value.shape:
            raise BadSampleError(
                f"wrong shape: {self.where} holds {list(value.shape)}, not [6, points]"
            )
        if value.shape[0] == 6 and value.shape[1] != 6:
            value = value.T
        check_count(LIMITS["point"], "points", len(value), self.where)
        buffer = io.BytesIO()
        with np.errstate(over="ignore"):  # what overflows is not finite, which the check finds
            np.save(buffer, np.ascontiguousarray(value, np.float32))
        return buffer.getvalue()
