"""Point clouds that torch.save wrote, as `.npy`.

Cap3D's `.pt` files are tensors [6, 16384]: x, y, z, red, green, blue.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from onellm_dist.shards.sources.base import BadSampleError, Media


@dataclass(frozen=True)
class TensorCloud:
    """A `.pt` cloud as `.npy` [N, 6] fp32."""

    source: Media
    where: str
    """Its name in messages."""

    def read_bytes(self) -> bytes:
        """Return the `.npy` file.

        Raises:
            BadSampleError: the file is not a tensor (pickled code is never run), or has another
                shape or type of numbers.
        """
        import torch

        data = self.source.read_bytes()
        try:
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # broken pickles and zips raise nearly anything
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadSampleError(f"unreadable .pt: {self.where}: {first[:200]}") from error
        if not isinstance(value, torch.Tensor):
            raise BadSampleError(
                f"wrong type: {self.where} holds a {type(value).__name__}, not a tensor"
            )
        if not (value.is_floating_point() or value.dtype == torch.uint8):
            raise BadSampleError(
                f"wrong type: {self.where} holds {value.dtype}, not floating-point numbers"
            )
        if value.ndim != 2 or 6 not in value.shape:
            raise BadSampleError(
                f"wrong shape: {self.where} holds {list(value.shape)}, not [6, points]"
            )
        if value.shape[0] == 6 and value.shape[1] != 6:
            value = value.t()
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(value.float().numpy()))
        return buffer.getvalue()
