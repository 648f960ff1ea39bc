"""Toy images (`jpg`, 224 x 224): one flat shape."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from onellm_dist.shards.sources.toyworld.draws import RenderedMedia
from onellm_dist.shards.sources.toyworld.shapes2d import BACKGROUND, paint_shape, vary_colour
from onellm_dist.shards.sources.toyworld.world import Attributes

SIDE = 224
_RADIUS = {"small": 17.0, "medium": 28.0, "large": 44.0}
_CENTRE = {"left": 54.0, "center": 112.0, "right": 170.0}


def draw_image(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Draw the picture, [224, 224, 3] uint8."""
    canvas = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    paint_shape(
        canvas,
        attributes["shape"],
        centre=(_CENTRE[attributes["position"]] + rng.uniform(-8, 8), 112 + rng.uniform(-24, 24)),
        radius=_RADIUS[attributes["size"]] * rng.uniform(0.92, 1.08),
        angle=rng.uniform(-15, 15),
        colour=vary_colour(attributes["color"], rng),
    )
    return canvas


def encode_jpeg(picture: np.ndarray) -> bytes:
    """Encode [H, W, 3] uint8 as JPEG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="JPEG", quality=92)
    return out.getvalue()


def render(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """Render an image sample."""
    return RenderedMedia({"jpg": encode_jpeg(draw_image(attributes, rng))})
