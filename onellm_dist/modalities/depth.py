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
from onellm_dist.modalities.limits import LIMITS
from onellm_dist.modalities.pairs import PairModality


class DepthModality(PairModality):
    """Depth maps with their pictures.

    | | |
    |---|---|
    | files | `depth`: depth.png, depth.jpg, depth.jpeg, depth.webp, depth.npy |
    | | `image`: jpg, jpeg, png, webp |
    | raw signal | `MapPair`: picture and map, both RGB, the map resized to the picture |
    | model input | [2, 3, 224, 224]: picture, map; CLIP's normalisation |
    | encoder tokens | 2 sequences of 256 patches and the class token |

    Units do not matter. 8-bit maps are used as they are (grey or colour, near is bright). 16-bit
    and float maps are rendered to 8-bit grey: the smallest to the largest valid value (finite and
    above 0) becomes 1 to 255, all others 0. `"depth_is_distance": true` in the sample's json says
    that large values are far; their inverse is rendered then.
    """

    name = "depth"
    order = 4
    limits = LIMITS["depth"]
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "depth": ("depth.png", "depth.jpg", "depth.jpeg", "depth.webp", "depth.npy"),
        "image": IMAGE_EXTENSIONS,
    }

    def render(self, part: Part, meta: Mapping[str, Any]) -> Image.Image:
        """Render the map as RGB.

        If `meta["depth_is_distance"]` is true, 16-bit and float values are distances. Near must be
        bright, as in DPT's maps that the paper trains on, so their inverse is rendered.
        """
        if part.data[:6] == b"\x93NUMPY":
            values = read_npy(part)
        else:
            picture = open_picture(part)
            if not picture.mode.startswith(("I", "F")):
                return picture.convert("RGB")
            values = np.asarray(picture)
        inverse = bool(meta.get("depth_is_distance", False))
        return render_depth(values, inverse=inverse, name=f".{part.extension}")


def render_depth(values: np.ndarray, *, inverse: bool, name: str) -> Image.Image:
    """Render numbers as grey RGB: valid values to 1..255 linearly, values <= 0 to 0.

    Args:
        values: [H, W], [1, H, W] or [H, W, 1]: depth, or inverse depth; 0 and less means "not
            measured".
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
    # A flat map has no range to stretch: it gets the middle of the scale.
    grey[valid] = np.round(1 + 254 * (depth - low) / (high - low)) if high > low else 128
    return Image.fromarray(grey).convert("RGB")


MODALITY = DepthModality()
