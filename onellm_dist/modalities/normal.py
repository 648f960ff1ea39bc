"""Surface normal maps, each with the picture it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.io.colour import convert_to_rgb
from onellm_dist.modalities.io.pictures import IMAGE_EXTENSIONS
from onellm_dist.modalities.limits import LIMITS
from onellm_dist.modalities.pairs import (
    MAP_KEYS,
    PairModality,
    list_map_extensions,
    note_invalid_pixels,
)


class NormalModality(PairModality):
    """Surface normal maps with their pictures.

    | | |
    |---|---|
    | files | `normal`: normal.png, normal.npy, and normal. with the other extensions of images |
    | | `image`: as of the modality image |
    | raw signal | `MapPair`: picture and map, both RGB, the map resized to the picture |
    | model input | [2, 3, 224, 224]: picture, map; CLIP's normalisation |
    | encoder tokens | 2 sequences of 256 patches and the class token |

    Picture files are used as they are (16-bit ones as of the modality image). Float arrays
    [H, W, 3] or [3, H, W] hold unit vectors with components in [-1, 1]; they are rendered as
    round((n + 1) / 2 * 255), the usual picture of normals; pixels that are not finite are black.

    A map is turned with its picture as depth maps are.
    """

    name = "normal"
    order = 5
    limits = LIMITS["normal"]
    meta_keys = MAP_KEYS
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "normal": list_map_extensions("normal"),
        "image": IMAGE_EXTENSIONS,
    }

    def render_picture(
        self, picture: Image.Image, meta: Mapping[str, Any], name: str
    ) -> Image.Image:
        """Render a map that is stored as a picture: as any picture."""
        return convert_to_rgb(picture)

    def render_array(self, values: np.ndarray, meta: Mapping[str, Any], name: str) -> Image.Image:
        """Render a map of unit vectors."""
        return render_normals(values, name=name)


def render_normals(vectors: np.ndarray, *, name: str) -> Image.Image:
    """Render unit vectors as RGB; components up to 1% outside [-1, 1] are clipped.

    Args:
        vectors: [H, W, 3] or [3, H, W], floats; a pixel with NaN or infinities becomes black.
        name: what an error calls the map.

    Raises:
        SampleError: the shape is another, or components lie outside.
    """
    if vectors.ndim == 3 and vectors.shape[0] == 3 and vectors.shape[2] != 3:
        vectors = vectors.transpose(1, 2, 0)
    if vectors.ndim != 3 or vectors.shape[2] != 3 or min(vectors.shape) < 2:
        raise SampleError(
            f"{name} has shape {vectors.shape}, not [height, width, 3]",
            "it is not a normal map.",
            "store one unit vector per pixel.",
        )
    valid = np.isfinite(vectors).all(2)
    if not valid.any():
        raise SampleError(
            f"{name} has no pixel that is finite",
            "there is no normal in it.",
            "drop the sample, or make the map again.",
        )
    largest = float(np.abs(vectors[valid]).max())
    if vectors.dtype.kind != "f" or largest > 1.01:
        raise SampleError(
            f"{name} has {vectors.dtype} components up to {largest:g}, not floats in [-1, 1]",
            "they are not unit vectors, so their colours would mean nothing.",
            "normalise them, or store the rendered map as a picture.",
        )
    note_invalid_pixels(~valid, name)
    colours = np.zeros(vectors.shape, np.uint8)
    colours[valid] = np.round((vectors[valid].clip(-1, 1).astype(np.float64) + 1) * 127.5)
    return Image.fromarray(colours)


MODALITY = NormalModality()
