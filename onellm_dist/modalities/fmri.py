"""fMRI: the voxels of NSD subject 1's nsdgeneral region, averaged over repetitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from onellm_dist.modalities.base import Modality, Part

if TYPE_CHECKING:
    from PIL import Image

VOXELS = 15724
FMRI_TOKENS = 8


class FmriTokenizer(nn.Module):
    """One linear map to 8 tokens: [n, 1, 15724] -> [n, 8, width]; output c*8 + t of the map is channel c of token t."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(VOXELS, FMRI_TOKENS * width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 1, 15724] -> [n, 8, width]."""
        flat = self.linear(values.to(self.linear.weight.dtype))
        return flat.reshape(len(values), self.width, FMRI_TOKENS).transpose(1, 2)


class FmriModality(Modality):
    """fMRI: the voxels of NSD subject 1's nsdgeneral region, averaged over repetitions."""

    name = "fmri"
    order = 7
    slots: ClassVar[Mapping[str, tuple[str, ...]]] = {"fmri": ("fmri.npy", "nsdgeneral.npy", "npy")}
    value_shape = (1, VOXELS)
    tokens = FMRI_TOKENS

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def transform(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        raise NotImplementedError

    def tokenizer(self, width: int) -> nn.Module | None:
        return FmriTokenizer(width)

    def preview(self, raw: Any) -> Image.Image:
        raise NotImplementedError


MODALITY = FmriModality()
