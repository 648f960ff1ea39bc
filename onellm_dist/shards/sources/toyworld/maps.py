"""Toy depth and normal maps: a coloured solid as picture (`jpg`) and map, both 224 x 224.

The maps are `depth.png` and `normal.png`. The camera is orthographic and the solid's size is
random, so the picture says nothing about distance. The surface behind the solid is visible in the
normal map alone. Each map is needed for one attribute, the picture for the colour.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from onellm_dist.shards.sources.toyworld.draws import RenderedMedia
from onellm_dist.shards.sources.toyworld.image import SIDE, encode_jpeg
from onellm_dist.shards.sources.toyworld.raycast import SolidView, cast_rays
from onellm_dist.shards.sources.toyworld.shapes2d import BACKGROUND, vary_colour
from onellm_dist.shards.sources.toyworld.solids import make_rotation
from onellm_dist.shards.sources.toyworld.world import Attributes

_LIGHT = np.array([-0.45, 0.6, 0.66])
_NEARNESS = {"nearby": 0.94, "midway": 0.58, "faraway": 0.22}
"""Grey value of the depth map at a solid's centre; 1 is nearest."""
_WALL_NEARNESS = 0.03
"""Grey value of the depth map at the wall."""
_RELIEF = 0.07
"""Grey value that a relief of one radius adds."""
_BEHIND = {
    "wall": (0.0, 0.0, 1.0),
    "floor": (0.0, 0.85, 0.53),
    "ceiling": (0.0, -0.85, 0.53),
    "ramp": (0.85, 0.0, 0.53),
}
"""Normal of the surface behind the solid, about a unit vector."""


def view_solid(attributes: Attributes, rng: np.random.Generator) -> SolidView:
    """View the attributes' solid at a random place, in a random size and rotation."""
    solid = attributes["solid"]
    # A torus is seen rather from above, so that its hole is visible; a cube rather by an edge.
    pitch = math.radians(58 if solid == "torus" else 24) + rng.uniform(-0.14, 0.14)
    yaw = math.radians(45) + rng.uniform(-0.35, 0.35)
    centre = (112 + rng.uniform(-22, 22), 112 + rng.uniform(-22, 22))
    turn = make_rotation(pitch=pitch, yaw=yaw, roll=rng.uniform(-0.12, 0.12))
    return cast_rays(solid, turn, centre=centre, radius=rng.uniform(40, 58), side=SIDE)


def shade_solid(view: SolidView, colour: np.ndarray) -> np.ndarray:
    """Draw the shaded solid on the constant background, [224, 224, 3] uint8."""
    canvas = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    lit = 0.62 + 0.42 * np.clip(view.normals @ _LIGHT, 0, 1)
    shaded = np.clip(np.rint(lit[:, None] * colour), 0, 255)
    canvas[view.rows, view.columns] = shaded.astype(np.uint8)
    return canvas


def render_depth(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """Render a depth sample."""
    view = view_solid(attributes, rng)
    grey = np.full((SIDE, SIDE), _WALL_NEARNESS)
    grey[view.rows, view.columns] = (
        _NEARNESS[attributes["distance"]] + rng.uniform(-0.03, 0.03) + _RELIEF * view.height
    )
    depth = np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)
    return RenderedMedia(
        {
            "jpg": encode_jpeg(shade_solid(view, vary_colour(attributes["color"], rng))),
            "depth.png": encode_png(depth),
        }
    )


def render_normal(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """Render a normal sample."""
    view = view_solid(attributes, rng)
    behind = np.array(_BEHIND[attributes["surface"]]) + rng.uniform(-0.06, 0.06, size=3)
    normals = np.empty((SIDE, SIDE, 3))
    normals[:] = behind / np.linalg.norm(behind)
    normals[view.rows, view.columns] = view.normals
    packed = np.rint((normals + 1) / 2 * 255).astype(np.uint8)
    return RenderedMedia(
        {
            "jpg": encode_jpeg(shade_solid(view, vary_colour(attributes["color"], rng))),
            "normal.png": encode_png(packed),
        }
    )


def encode_png(values: np.ndarray) -> bytes:
    """Encode [H, W] or [H, W, 3] uint8 as PNG."""
    out = io.BytesIO()
    Image.fromarray(values).save(out, format="PNG", compress_level=2)
    return out.getvalue()
