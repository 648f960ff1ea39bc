"""Still images, read by the encoder's own patch embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.visual import IMAGE_EXTENSIONS, PATCHES, SIDE

if TYPE_CHECKING:
    from PIL import Image


class ImageModality(Modality):
    """Still images, read by the encoder's own patch embedding."""

    name = "image"
    order = 0
    slots: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": IMAGE_EXTENSIONS}
    value_shape = (3, SIDE, SIDE)
    tokens = PATCHES
    visual = True

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def transform(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        raise NotImplementedError

    def tokenizer(self, width: int) -> nn.Module | None:
        return None

    def preview(self, raw: Any) -> Image.Image:
        raise NotImplementedError


MODALITY = ImageModality()
