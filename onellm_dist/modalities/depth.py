"""Depth maps, each with the picture it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.io.colour import convert_to_rgb
from onellm_dist.modalities.io.pictures import IMAGE_EXTENSIONS
from onellm_dist.modalities.limits import LIMITS
from onellm_dist.modalities.meta_keys import MetaKey, parse_flag
from onellm_dist.modalities.pairs import (
    MAP_KEYS,
    PairModality,
    list_map_extensions,
    note_invalid_pixels,
)


class DepthModality(PairModality):
    """Depth maps with their pictures.

    | | |
    |---|---|
    | files | `depth`: depth.png, depth.npy, and depth. with the other extensions of images |
    | | `image`: as of the modality image |
    | raw signal | `MapPair`: picture and map, both RGB, the map resized to the picture |
    | model input | [2, 3, 224, 224]: picture, map; CLIP's normalisation |
    | encoder tokens | 2 sequences of 256 patches and the class token |

    Units do not matter. 8-bit maps are used as they are (grey or colour, near is bright). 16-bit
    and float maps are rendered to 8-bit grey: the smallest to the largest valid value (finite and
    above 0) becomes 1 to 255, all others 0. `"depth_is_distance": true` in the sample's json says
    that large values are far; their inverse is rendered then.

    A picture with an EXIF orientation is turned upright, and its map with it if the map has the
    size of the stored pixels. Where sizes do not show it (squares, half turns, mirrored pictures),
    the sample is refused, unless the map's file states its own orientation or the sample's json
    says which pixels its map was made from: `"map_orientation": "stored"` (as they lie in the
    file, which most programs read) or `"upright"` (as viewers show them).
    """

    name = "depth"
    order = 4
    limits = LIMITS["depth"]
    meta_keys: ClassVar[Mapping[str, MetaKey]] = {
        **MAP_KEYS,
        "depth_is_distance": MetaKey("true where large values are far", parse_flag),
    }
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "depth": list_map_extensions("depth"),
        "image": IMAGE_EXTENSIONS,
    }

    def render_picture(
        self, picture: Image.Image, meta: Mapping[str, Any], name: str
    ) -> Image.Image:
        """Render a map that is stored as a picture: 8 bits as they are, more as numbers."""
        if picture.mode.startswith(("I", "F")):
            return self.render_array(np.asarray(picture), meta, name)
        return convert_to_rgb(picture)

    def render_array(self, values: np.ndarray, meta: Mapping[str, Any], name: str) -> Image.Image:
        """Render a map of numbers.

        If `meta["depth_is_distance"]` is true, 16-bit and float values are distances. Near must be
        bright, as in DPT's maps that the paper trains on, so their inverse is rendered.
        """
        return render_depth(values, inverse=bool(meta.get("depth_is_distance", False)), name=name)


def render_depth(values: np.ndarray, *, inverse: bool, name: str) -> Image.Image:
    """Render numbers as grey RGB: valid values to 1..255 linearly, values <= 0 to 0.

    Args:
        values: [H, W], [1, H, W] or [H, W, 1]: depth, or inverse depth; 0 and less, NaN and
            infinities mean "not measured".
        inverse: whether to render 1 / value.
        name: what an error calls the map.

    Raises:
        SampleError: the map does not have two dimensions, or has no valid value.
    """
    grid = values.squeeze()
    if grid.ndim != 2 or min(grid.shape) < 2:
        raise SampleError(
            f"{name} has shape {values.shape}, not [height, width]",
            "it is not a depth map.",
            "store one value per pixel: [H, W] in .npy, or a grey picture.",
        )
    depth = grid.astype(np.float64)
    if inverse:
        with np.errstate(divide="ignore", over="ignore"):
            depth = 1.0 / depth
    valid = np.isfinite(grid) & np.isfinite(depth) & (grid > 0)
    if not valid.any():
        raise SampleError(
            f"{name} has no finite value above 0",
            "nothing in it was measured.",
            "drop the sample, or store depth as positive numbers.",
        )
    note_invalid_pixels(~np.isfinite(grid), name)
    depth = depth[valid]
    low, high = depth.min(), depth.max()
    grey = np.zeros(grid.shape, np.uint8)
    # A flat map has no range to stretch: it gets the middle of the scale.
    grey[valid] = np.round(1 + 254 * (depth - low) / (high - low)) if high > low else 128
    return Image.fromarray(grey).convert("RGB")


MODALITY = DepthModality()
