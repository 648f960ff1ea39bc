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
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.drawing import join_pictures, make_thumbnail
from onellm_dist.modalities.io.alignment import MAP_ORIENTATIONS, align_map
from onellm_dist.modalities.io.arrays import is_npy, read_npy
from onellm_dist.modalities.io.colour import convert_to_rgb
from onellm_dist.modalities.io.damage import note_damage
from onellm_dist.modalities.io.pictures import (
    IMAGE_EXTENSIONS,
    make_upright_picture,
    open_picture,
)
from onellm_dist.modalities.limits import check_count
from onellm_dist.modalities.meta_keys import MetaKey, make_choice_parser
from onellm_dist.modalities.pixels import PixelModality
from onellm_dist.modalities.transforms.crops import (
    PATCHES,
    SIDE,
    choose_crop_box,
    crop_eval,
    crop_train,
    make_picture,
    split_channels,
)

_ORIENTATION_KEY = "map_orientation"
MAP_KEYS: Mapping[str, MetaKey] = {
    _ORIENTATION_KEY: MetaKey(
        "stored or upright: which pixels of a turned picture (EXIF) its map was made from",
        make_choice_parser(*MAP_ORIENTATIONS),
    )
}
"""Keys of a sample's `.json` that hold for maps of every kind."""


def list_map_extensions(name: str) -> tuple[str, ...]:
    """List the extensions of the maps of a modality, such as `depth.png`, the usual ones first."""
    return tuple(
        f"{name}.{e}" for e in ("png", "jpg", "jpeg", "webp", "npy", *IMAGE_EXTENSIONS[4:])
    )


@dataclass(frozen=True)
class MapPair:
    """A picture and a map of it; those that `decode` returns are RGB, upright and of one size.

    Attributes:
        picture: the picture.
        map: its map.
        map_orientation: of a pair that a program holds: which pixels of a turned picture the map
            was made from, as in a sample's json.
    """

    picture: Image.Image
    map: Image.Image
    map_orientation: str | None = None


def note_invalid_pixels(invalid: np.ndarray, name: str) -> None:
    """Note the pixels of a map that are not finite; the others are used, however few they are.

    Args:
        invalid: [H, W] of bool.
        name: what the note calls the map.
    """
    count = int(invalid.sum())
    if count:
        what = f"{name}: {count:,} of {invalid.size:,} pixels are NaN or infinite, and taken as 0"
        note_damage(what, 0.0)


def _get_orientation(meta: Mapping[str, Any]) -> str | None:
    """Which pixels the map was made from, as the sample's json says; None: it does not.

    Raises:
        SampleError: it says something else.
    """
    stated = meta.get(_ORIENTATION_KEY)
    if stated is not None and stated not in MAP_ORIENTATIONS:
        raise SampleError(
            f"{_ORIENTATION_KEY} is {stated!r}, not {' or '.join(MAP_ORIENTATIONS)}",
            "it says which pixels of a turned picture the map was made from.",
            "correct it in the sample's json, or remove it.",
        )
    return stated


def _make_pair(picture: Image.Image, rendered: Image.Image) -> MapPair:
    if rendered.size != picture.size:
        rendered = rendered.resize(picture.size, Image.Resampling.BICUBIC)
    return MapPair(picture, rendered)


class PairModality(PixelModality):
    """A map with the picture it belongs to; a subclass says how a map becomes 8-bit RGB."""

    value_shape = (2, 3, SIDE, SIDE)
    frames = 2
    tokens = PATCHES
    visual = True

    def render(self, part: Part, meta: Mapping[str, Any]) -> Image.Image:
        """Render the map as an 8-bit RGB picture, upright by its own orientation tag.

        Args:
            part: the file of the map.
            meta: the sample's `.json`, or an empty mapping.

        Raises:
            SampleError: the file cannot be read as a map of this kind.
        """
        name = f".{part.extension}"
        if not is_npy(part):
            return self.render_picture(open_picture(part, self.limits).image, meta, name)
        values = read_npy(part, finite=False)
        check_count(self.limits, "values", values.size, name)
        return self.render_array(values, meta, name)

    @abstractmethod
    def render_picture(
        self, picture: Image.Image, meta: Mapping[str, Any], name: str
    ) -> Image.Image:
        """Render a map that is stored as a picture of any mode, as `render` does."""

    @abstractmethod
    def render_array(self, values: np.ndarray, meta: Mapping[str, Any], name: str) -> Image.Image:
        """Render a map that is stored as numbers; NaN and infinities are invalid pixels: 0."""

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> MapPair:
        """Decode both; the map is resized to the picture's size (bicubic), as in the reference.

        A map of the stored pixels of a turned picture (EXIF) is turned like it.

        Raises:
            SampleError: as of `Modality.decode`, or the orientations disagree (see `align_map`).
        """
        part, photo = parts[self.name], open_picture(parts["image"], self.limits)
        is_tagged = (
            photo.orientation > 1 and not is_npy(part) and open_picture(part, self.limits).is_tagged
        )
        names = (f".{parts['image'].extension}", f".{part.extension}")
        rendered = align_map(
            self.render(part, meta),
            photo,
            is_tagged=is_tagged,
            names=names,
            stated=_get_orientation(meta),
        )
        return _make_pair(convert_to_rgb(photo.image), rendered)

    def make_raw(self, item: Any) -> Any:
        """Take a `MapPair` of pictures of any modes and sizes as `decode` takes files."""
        if not isinstance(item, MapPair):
            return item
        names = ("the picture", f"the {self.name} map")
        photo, held = (make_upright_picture(p, self.limits) for p in (item.picture, item.map))
        if photo is None or held is None:
            raise SampleError(
                f"{names[photo is not None]} is not a picture",
                "a pair is a picture and a map of it.",
                "give a PIL.Image, or an array of pixels.",
            )
        rendered = align_map(
            self.render_picture(held.image, {}, names[1]),
            photo,
            is_tagged=held.is_tagged and photo.orientation > 1,
            names=names,
            stated=_get_orientation({_ORIENTATION_KEY: item.map_orientation}),
        )
        return _make_pair(convert_to_rgb(photo.image), rendered)

    def cut_pixels(self, raw: MapPair, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[2, 3, 224, 224]: picture, map, cropped alike (training: at random, else the middle)."""
        both = (raw.picture, raw.map)
        if train:
            box = choose_crop_box(*raw.picture.size, rng)
            return torch.stack([split_channels(crop_train(p, box)) for p in both])
        return torch.stack([split_channels(crop_eval(p)) for p in both])

    def build_tokenizer(self, width: int) -> None:
        """Return None: the encoder reads pixels itself."""
        return

    def preview(self, raw: MapPair) -> Image.Image:
        """Picture and map side by side, at most 224 pixels a side each."""
        return join_pictures([make_thumbnail(raw.picture, SIDE), make_thumbnail(raw.map, SIDE)])

    def draw_value(self, value: torch.Tensor) -> Image.Image:
        """The crops of picture and map side by side, 224 pixels a side each."""
        return join_pictures([make_picture(crop) for crop in value])

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
