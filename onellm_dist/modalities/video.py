"""Videos: 5 frames x 3 crops, each an encoder sequence of its own; their outputs are averaged (paper 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.visual import PATCHES, SIDE

if TYPE_CHECKING:
    from PIL import Image


class VideoModality(Modality):
    """Videos: 5 frames x 3 crops, each an encoder sequence of its own; their outputs are averaged (paper 3.1)."""

    name = "video"
    order = 1
    slots: ClassVar[Mapping[str, tuple[str, ...]]] = {"video": ("mp4", "webm", "mkv", "avi", "mov", "m4v")}
    value_shape = (15, 3, SIDE, SIDE)
    frames = 15
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


MODALITY = VideoModality()
