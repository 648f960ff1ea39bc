"""Still images, read by the encoder's own patch embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.io.pictures import (
    IMAGE_EXTENSIONS,
    PATCHES,
    SIDE,
    crop_eval,
    crop_train,
    decode_picture,
    normalise,
    random_box,
    thumbnail,
)


class ImageModality(Modality):
    """Still images. The raw signal is an RGB `PIL.Image`."""

    name = "image"
    order = 0
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": IMAGE_EXTENSIONS}
    value_shape = (3, SIDE, SIDE)
    tokens = PATCHES
    visual = True

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Image.Image:
        """JPEG, PNG or WebP to RGB (see `visual.decode_picture`)."""
        return decode_picture(parts["image"])

    def transform(self, raw: Image.Image, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[3, 224, 224]: a random crop of at least 0.9 of the area (train), or short side 224 and the middle (eval)."""
        return normalise(crop_train(raw, random_box(*raw.size, rng)) if train else crop_eval(raw))

    def tokenizer(self, width: int) -> None:
        """None: the encoder reads pixels itself."""
        return

    def preview(self, raw: Image.Image) -> Image.Image:
        """The picture, at most 448 pixels a side."""
        return thumbnail(raw, 448)


MODALITY = ImageModality()
