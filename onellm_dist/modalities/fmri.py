"""fMRI: the voxels of NSD subject 1's nsdgeneral region, averaged over repetitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.drawing import draw_heatmap
from onellm_dist.modalities.io.arrays import read_npy, require_finite
from onellm_dist.modalities.limits import LIMITS

VOXELS = 15724
FMRI_TOKENS = 8


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
    | files | `fmri`: fmri.npy, nsdgeneral.npy, npy; [15724] or [repetitions, 15724], numbers |
    | raw signal | [15724] fp32, the mean over repetitions |
    | model input | [1, 15724], in the file's units (NSD's betas); nothing is normalised |
    | encoder tokens | 8 and the class token |
    """

    name = "fmri"
    order = 7
    limits = LIMITS["fmri"]
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "fmri": ("fmri.npy", "nsdgeneral.npy", "npy")
    }
    value_shape = (1, VOXELS)
    tokens = FMRI_TOKENS

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> np.ndarray:
        """Average [voxels] or [repetitions, voxels] to [15724] fp32."""
        part = parts["fmri"]
        array = read_npy(part)
        if array.shape[-1:] != (VOXELS,) or array.ndim > 2 or array.size == 0:
            raise SampleError(
                f".{part.extension} has shape {array.shape}, "
                f"not [{VOXELS}] or [repetitions, {VOXELS}]",
                "the tokenizer is made for the nsdgeneral voxels of NSD subject 1.",
                "use that subject's voxels; other subjects have other numbers of them.",
            )
        mean = array.reshape(-1, VOXELS).mean(0, dtype=np.float64)
        with np.errstate(over="ignore"):
            voxels: np.ndarray = mean.astype(np.float32)
        require_finite(voxels, f".{part.extension} (in fp32)")
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


MODALITY = FmriModality()
