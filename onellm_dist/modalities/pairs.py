"""Depth and normal maps: pairs of a picture and a map of it, cut alike, both encoded, their tokens averaged."""

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
from onellm_dist.modalities.io.pictures import (
    PATCHES,
    SIDE,
    beside,
    crop_eval,
    crop_train,
    decode_picture,
    normalise,
    random_box,
    thumbnail,
)


@dataclass(frozen=True)
class Pair:
    """A picture and a map of it, both RGB and of one size."""

    picture: Image.Image
    map: Image.Image


class PairModality(Modality):
    """A map with the picture it belongs to; subclasses say how a map becomes 8-bit RGB. The raw signal is a `Pair`."""

    value_shape = (2, 3, SIDE, SIDE)
    frames = 2
    tokens = PATCHES
    visual = True

    @abstractmethod
    def render(self, part: Part, meta: Mapping[str, Any]) -> Image.Image:
        """The map as an 8-bit RGB picture.

        Raises:
            SampleError: it cannot be read as a map of this kind.
        """

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Pair:
        """Both pictures; the map is resized to the picture's size (bicubic), as the reference does."""
        picture, rendered = decode_picture(parts["image"]), self.render(parts[self.name], meta)
        if rendered.size != picture.size:
            rendered = rendered.resize(picture.size, Image.Resampling.BICUBIC)
        return Pair(picture, rendered)

    def transform(self, raw: Pair, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[2, 3, 224, 224]: picture, map; the same crop of both (train: random; eval: the middle)."""
        both = (raw.picture, raw.map)
        if train:
            box = random_box(*raw.picture.size, rng)
            return torch.stack([normalise(crop_train(p, box)) for p in both])
        return torch.stack([normalise(crop_eval(p)) for p in both])

    def tokenizer(self, width: int) -> None:
        """None: the encoder reads pixels itself."""
        return

    def preview(self, raw: Pair) -> Image.Image:
        """Picture and map side by side, at most 224 pixels a side each."""
        return beside([thumbnail(raw.picture, SIDE), thumbnail(raw.map, SIDE)])

    def parts_from_file(self, path: Path) -> dict[str, Part]:
        """As the default, and for `<stem>_<name>.png` (Omnidata's names) the picture is looked for as `<stem>.*` too."""
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
        parts = super().parts_from_file(path)
        if parts["image"].data == parts[self.name].data:
            raise SampleError(
                f"{path}: the picture found beside it is the {self.name} map itself",
                "the model compares a picture with its map.",
                f"name the map {stem}.{self.required_parts[self.name][0]} and the picture {stem}.jpg or {stem}.png.",
            )
        return parts
