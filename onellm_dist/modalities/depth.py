"""Depth maps, each with the picture it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.io.arrays import read_npy
from onellm_dist.modalities.io.pictures import IMAGE_EXTENSIONS, open_picture
from onellm_dist.modalities.pairs import PairModality


class DepthModality(PairModality):
    """Depth maps with their pictures.

    8-bit maps are taken as they are (grey or colour). 16-bit and float maps are rendered to 8-bit grey: the least to the
    greatest VALID value (finite and above 0) becomes 1 to 255, the rest 0 (`render_depth`).
    """

    name = "depth"
    order = 4
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "depth": ("depth.png", "depth.jpg", "depth.jpeg", "depth.webp", "depth.npy"),
        "image": IMAGE_EXTENSIONS,
    }

    def render(self, part: Part, meta: Mapping[str, Any]) -> Image.Image:
        """The map as RGB. `meta["depth_is_distance"]` true: 16-bit and float values are distances (near must be bright,
        as in DPT's maps that the paper trains on), so their inverse is rendered.
        """
        if part.data[:6] == b"\x93NUMPY":
            values = read_npy(part)
        else:
            picture = open_picture(part)
            if not picture.mode.startswith(("I", "F")):
                return picture.convert("RGB")
            values = np.asarray(picture)
        return render_depth(
            values, inverse=bool(meta.get("depth_is_distance", False)), name=f".{part.extension}"
        )


def render_depth(values: np.ndarray, *, inverse: bool, name: str) -> Image.Image:
    """[H, W] (or [1, H, W], [H, W, 1]) numbers to grey RGB: valid values to 1..255 linearly, values <= 0 to 0.

    Args:
        values: depth, or inverse depth; 0 and less means "not measured".
        inverse: render 1 / value.
        name: how an error calls the map.

    Raises:
        SampleError: not a map of two dimensions, or without a valid value.
    """
    grid = values.squeeze()
    if grid.ndim != 2 or min(grid.shape) < 2:
        raise SampleError(
            f"{name} has shape {values.shape}, not [height, width]",
            "it is no depth map.",
            "store one value a pixel: [H, W] in .npy, or a grey picture.",
        )
    valid = grid > 0
    if not valid.any():
        raise SampleError(
            f"{name} has no value above 0",
            "nothing in it was measured.",
            "drop the sample, or store depth as positive numbers.",
        )
    depth = grid[valid].astype(np.float64)
    if inverse:
        depth = 1.0 / depth
    low, high = depth.min(), depth.max()
    grey = np.zeros(grid.shape, np.uint8)
    # A flat map has no range to stretch: the middle of the scale.
    grey[valid] = np.round(1 + 254 * (depth - low) / (high - low)) if high > low else 128
    return Image.fromarray(grey).convert("RGB")


MODALITY = DepthModality()
