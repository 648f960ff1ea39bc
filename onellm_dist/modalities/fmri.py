"""fMRI: the voxels of NSD subject 1's nsdgeneral region, averaged over repetitions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.drawing import draw_heatmap
from onellm_dist.modalities.io.arrays import read_npy
from onellm_dist.modalities.io.responses import average_repetitions, holds_whole_numbers
from onellm_dist.modalities.limits import LIMITS, check_count
from onellm_dist.modalities.meta_keys import MetaKey, parse_factor

VOXELS = 15724
FMRI_TOKENS = 8
_SCALE_KEY = "fmri_scale"


class FmriTokenizer(nn.Module):
    """One linear map to 8 tokens; output c * 8 + t of the map is channel c of token t."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(VOXELS, FMRI_TOKENS * width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 1, 15724] -> [n, 8, width]."""
        flat: torch.Tensor = self.linear(values.to(self.linear.weight.dtype))
        return flat.reshape(len(values), self.width, FMRI_TOKENS).transpose(1, 2)


class FmriModality(Modality):
    """fMRI responses to a picture: the nsdgeneral voxels of NSD subject 1.

    | | |
    |---|---|
    | files | `fmri`: fmri.npy, nsdgeneral.npy, npy; [15724], [repetitions, 15724], or transposed |
    | raw signal | [15724] fp32, the mean over repetitions |
    | model input | [1, 15724], in the file's units (NSD's betas); nothing is normalised |
    | encoder tokens | 8 and the class token |

    *Units.* The model learns from the numbers as they are, so all files of a dataset must use the
    same units: z-scores, as MindEye's files have, or percent signal change. Values beyond 1000 are
    neither, and are refused. So are whole numbers: NSD's own files hold percent times 300 as 16-bit
    integers. `{"fmri_scale": 300}` in the sample's json says so, or `-o describe=fmri_scale=300`
    for a whole build; the numbers are divided by it then. A repetition with NaN is left out and
    noted; the mean is over the others.
    """

    name = "fmri"
    order = 7
    limits = LIMITS["fmri"]
    meta_keys: ClassVar[Mapping[str, MetaKey]] = {
        _SCALE_KEY: MetaKey("what the file's numbers are divided by", parse_factor)
    }
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "fmri": ("fmri.npy", "nsdgeneral.npy", "npy")
    }
    value_shape = (1, VOXELS)
    tokens = FMRI_TOKENS

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> np.ndarray:
        """Average [voxels] or [repetitions, voxels] to [15724] fp32."""
        part = parts["fmri"]
        name = f".{part.extension}"
        array = read_npy(part, finite=False)
        if array.ndim == 2 and array.shape[0] == VOXELS:
            array = array.T
        if array.shape[-1:] != (VOXELS,) or array.ndim > 2 or array.size == 0:
            raise SampleError(
                f"{name} has shape {array.shape}, not [{VOXELS}] or [repetitions, {VOXELS}]",
                "the tokenizer is made for the nsdgeneral voxels of NSD subject 1.",
                "use that subject's voxels; other subjects have other numbers of them.",
            )
        check_count(self.limits, "values", array.size, name)
        scale = _get_scale(meta)
        if scale is None and holds_whole_numbers(array):
            raise SampleError(
                f"{name} holds whole numbers ({array.dtype}), not z-scores or percent",
                "they are responses times an unknown factor, or something else than responses.",
                f'NSD\'s own files hold percent times 300: write {{"{_SCALE_KEY}": 300}} in the '
                "sample's json, or store the quotient as floats.",
            )
        voxels = average_repetitions(array, name, scale or 1.0)
        largest = float(np.abs(voxels).max())
        if largest > self.limits.magnitude:
            raise SampleError(
                f"{name} has a response of {largest:g}; the limit is {self.limits.magnitude:g}",
                "it is neither a z-score nor percent signal change, or a number is damaged.",
                f"state the factor of its numbers ({_SCALE_KEY}) in the sample's json, or drop the "
                "sample.",
            )
        return voxels

    def transform(self, raw: np.ndarray, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[1, 15724] as measured: the reference normalises nothing."""
        return torch.from_numpy(raw)[None].clone()

    def build_tokenizer(self, width: int) -> nn.Module:
        """Build one linear map."""
        return FmriTokenizer(width)

    def preview(self, raw: np.ndarray) -> Image.Image:
        """The voxels in rows of 448, blue below and red above 0, 448 x 216."""
        rows = np.zeros((-(-VOXELS // 448), 448), np.float32)
        rows.reshape(-1)[:VOXELS] = raw
        return draw_heatmap(rows, (448, 216), signed=True)

    def draw_value(self, value: torch.Tensor) -> Image.Image:
        """Draw a value as `preview` draws a raw scan."""
        return self.preview(value[0].numpy())


def _get_scale(meta: Mapping[str, Any]) -> float | None:
    """The factor that the sample's json states; None if it states none.

    Raises:
        SampleError: it is not a number above 0.
    """
    value = meta.get(_SCALE_KEY)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise SampleError(
            f"{_SCALE_KEY} is {value!r}, not a number above 0",
            "the file's numbers are divided by it.",
            f'write {{"{_SCALE_KEY}": 300}} for NSD\'s 16-bit integers, or remove the key.',
        )
    return float(value)


MODALITY = FmriModality()
