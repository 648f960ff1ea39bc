"""fMRI responses as the model reads them: the mean over repetitions."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from onellm_dist.common.errors import SampleError
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.modalities import Part
from onellm_dist.modalities.io.arrays import read_npy
from onellm_dist.modalities.io.responses import average_repetitions, holds_whole_numbers
from onellm_dist.shards.sources.base import BadSampleError, Media


@dataclass(frozen=True)
class MeanOfRepetitions:
    """A sample's voxels, averaged over repetitions, as `.npy` [voxels] fp32; of integers, all."""

    voxels: Media

    def read_bytes(self) -> bytes:
        """Average over the first axis in fp64.

        Whole numbers are returned as they are: the modality divides them by the factor that the
        build states, or refuses them, and could no longer tell them by their mean.

        Raises:
            BadSampleError: the content is not an array of finite numbers [repetitions, voxels].
        """
        data = self.voxels.read_bytes()
        with decoding():
            return self._average(data)

    def _average(self, data: bytes) -> bytes:
        try:
            array = read_npy(Part("nsdgeneral.npy", data), finite=False)
            if array.ndim not in (1, 2) or not array.size or array.dtype.kind not in "fiu":
                raise BadSampleError(
                    f"unreadable fMRI: {array.dtype} of shape {array.shape}, "
                    f"not numbers [repetitions, voxels] as MindEye's"
                )
            if holds_whole_numbers(array):
                return data
            if array.ndim == 2 and array.shape[0] > array.shape[1]:
                array = array.T  # as the modality reads it: there are more voxels than repetitions
            mean = average_repetitions(array, ".nsdgeneral.npy")
        except BadSampleError:
            raise
        except SampleError as error:
            raise BadSampleError(f"unreadable fMRI: {error.what}") from error
        buffer = io.BytesIO()
        np.save(buffer, mean)
        return buffer.getvalue()
