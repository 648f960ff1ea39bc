"""fMRI responses as the model reads them: the mean over repetitions."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part
from onellm_dist.modalities.io.arrays import read_npy
from onellm_dist.shards.sources.base import BadSampleError, Media


@dataclass(frozen=True)
class MeanOfRepetitions:
    """A sample's voxels as `.npy` [voxels] fp32."""

    voxels: Media

    def read_bytes(self) -> bytes:
        """Averages over the first axis in fp64.

        Raises:
            BadSampleError: no array of numbers, not finite, or not [repetitions, voxels].
        """
        try:
            array = read_npy(Part("nsdgeneral.npy", self.voxels.read_bytes()))
        except BadSampleError:
            raise
        except SampleError as error:
            raise BadSampleError(f"unreadable fMRI: {error.what}") from error
        if array.ndim not in (1, 2) or not array.size or array.dtype.kind != "f":
            raise BadSampleError(
                f"unreadable fMRI: {array.dtype} of shape {array.shape}, not floats [repetitions, voxels]"
            )
        buffer = io.BytesIO()
        np.save(
            buffer, array.reshape(-1, array.shape[-1]).mean(0, dtype=np.float64).astype(np.float32)
        )
        return buffer.getvalue()
