"""Surface normal maps, each with the picture it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.io.arrays import read_npy
from onellm_dist.modalities.io.pictures import IMAGE_EXTENSIONS, decode_picture
from onellm_dist.modalities.limits import LIMITS
from onellm_dist.modalities.pairs import PairModality


class NormalModality(PairModality):
    """Surface normal maps with their pictures.

    | | |
    |---|---|
    | files | `normal`: normal.png, normal.jpg, normal.jpeg, normal.webp, normal.npy |
    | | `image`: jpg, jpeg, png, webp |
    | raw signal | `MapPair`: picture and map, both RGB, the map resized to the picture |
    | model input | [2, 3, 224, 224]: picture, map; CLIP's normalisation |
    | encoder tokens | 2 sequences of 256 patches and the class token |

    Picture files are used as they are (16-bit ones lose their lower 8 bits). Float arrays
    [H, W, 3] or [3, H, W] hold unit vectors with components in [-1, 1]; they are rendered as
    round((n + 1) / 2 * 255), the usual picture of normals.
    """

    name = "normal"
    order = 5
    limits = LIMITS["normal"]
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "normal": ("normal.png", "normal.jpg", "normal.jpeg", "normal.webp", "normal.npy"),
        "image": IMAGE_EXTENSIONS,
    }

    def render(self, part: Part, meta: Mapping[str, Any]) -> Image.Image:
        """Render the map as RGB."""
        if part.data[:6] != b"\x93NUMPY":
            return decode_picture(part)
        return render_normals(read_npy(part), name=f".{part.extension}")


def render_normals(vectors: np.ndarray, *, name: str) -> Image.Image:
    """Render unit vectors as RGB; components up to 1% outside [-1, 1] are clipped.

    Args:
        vectors: [H, W, 3] or [3, H, W], floats.
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
    largest = float(np.abs(vectors).max())
    if vectors.dtype.kind != "f" or largest > 1.01:
        raise SampleError(
            f"{name} has {vectors.dtype} components up to {largest:g}, not floats in [-1, 1]",
            "they are not unit vectors, so their colours would mean nothing.",
            "normalise them, or store the rendered map as a picture.",
        )
    return Image.fromarray(
        np.round((vectors.clip(-1, 1).astype(np.float64) + 1) * 127.5).astype(np.uint8)
    )


MODALITY = NormalModality()
