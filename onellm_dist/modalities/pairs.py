"""What depth and normal share: a picture and a map of it, cropped alike.

Both are encoded, and their tokens are averaged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.drawing import join_pictures, make_thumbnail
from onellm_dist.modalities.io.pictures import decode_picture
from onellm_dist.modalities.transforms.crops import (
    PATCHES,
    SIDE,
    choose_crop_box,
    crop_eval,
    crop_train,
    normalise,
)


@dataclass(frozen=True)
class MapPair:
    """A picture and a map of it, both RGB and of one size."""

    picture: Image.Image
    map: Image.Image


class PairModality(Modality):
    """A map with the picture it belongs to; a subclass says how a map becomes 8-bit RGB."""

    value_shape = (2, 3, SIDE, SIDE)
    frames = 2
    tokens = PATCHES
    visual = True

    @abstractmethod
    def render(self, part: Part, meta: Mapping[str, Any]) -> Image.Image:
        """Render the map as an 8-bit RGB picture.

        Args:
            part: the file of the map.
            meta: the sample's `.json`, or an empty mapping.

        Raises:
            SampleError: the file cannot be read as a map of this kind.
        """

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> MapPair:
        """Decode both; the map is resized to the picture's size (bicubic), as in the reference."""
        picture, rendered = decode_picture(parts["image"]), self.render(parts[self.name], meta)
        if rendered.size != picture.size:
            rendered = rendered.resize(picture.size, Image.Resampling.BICUBIC)
        return MapPair(picture, rendered)

    def transform(self, raw: MapPair, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[2, 3, 224, 224]: picture, map, cropped alike (training: at random, else the middle)."""
        both = (raw.picture, raw.map)
        if train:
            box = choose_crop_box(*raw.picture.size, rng)
            return torch.stack([normalise(crop_train(p, box)) for p in both])
        return torch.stack([normalise(crop_eval(p)) for p in both])

    def build_tokenizer(self, width: int) -> None:
        """Return None: the encoder reads pixels itself."""
        return

    def preview(self, raw: MapPair) -> Image.Image:
        """Picture and map side by side, at most 224 pixels a side each."""
        return join_pictures([make_thumbnail(raw.picture, SIDE), make_thumbnail(raw.map, SIDE)])

    def read_parts(self, path: Path) -> dict[str, Part]:
        """Read a map and the picture beside it.

        For `<stem>_<name>.png` (Omnidata's names) the picture may be called `<stem>.*` too.
        """
        suffix = f"_{self.name}"
        stem = path.name.split(".", 1)[0]
        if stem.endswith(suffix):
            for extension in self.required_parts["image"]:
                picture = path.with_name(f"{stem.removesuffix(suffix)}.{extension}")
                if picture.exists():
                    return {
                        self.name: Part(path.name.split(".", 1)[-1].lower(), path.read_bytes()),
                        "image": Part(extension, picture.read_bytes()),
                    }
        parts = super().read_parts(path)
        if parts["image"].data == parts[self.name].data:
            extension = self.required_parts[self.name][0]
            raise SampleError(
                f"{path}: the picture found beside it is the {self.name} map itself",
                "the model compares a picture with its map.",
                f"name the map {stem}.{extension} and the picture {stem}.jpg or {stem}.png.",
            )
        return parts
