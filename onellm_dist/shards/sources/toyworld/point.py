"""Toy point clouds (`point.npy`, [8192, 6] fp16): a coloured solid, stretched along one axis.

The columns are x, y, z, then red, green, blue in 0..1. The model's tokenizer measures
neighbourhoods in colour and not in space (as the reference does), so the colour must say where on
the surface a point lies. Three coloured lights shade it by its normal, and a very slight gradient
by its position.
"""

from __future__ import annotations

import io

import numpy as np

from onellm_dist.shards.sources.toyworld.draws import RenderedMedia
from onellm_dist.shards.sources.toyworld.shapes2d import vary_colour
from onellm_dist.shards.sources.toyworld.solids import make_rotation, sample_surface
from onellm_dist.shards.sources.toyworld.world import Attributes

POINTS = 8192
_AXES = {"wide": 0, "tall": 1, "deep": 2}
_SQUEEZE = 0.5
_LIGHTS = np.array([[0.7, 0.6, 0.4], [-0.7, 0.5, 0.5], [0.1, -0.4, 0.9]])
"""Directions of the red, the green and the blue light."""
_BRIGHT = 0.7
_LIT = 0.14
_GRADIENT = 0.02
"""Strength of the colour gradient by position.

A flat face has nearly one colour, so its neighbourhoods span the face and show its outline; those
of a curved surface are local. With a gradient three times as steep, a small PointNet needed three
times the samples to distinguish the solids."""
_GRAIN = 0.008


def make_cloud(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Make the cloud, [8192, 6] fp64; the points are random samples of the surface."""
    points, normals = sample_surface(attributes["solid"], POINTS, rng)
    scale = _SQUEEZE * rng.uniform(0.9, 1.1, size=3)
    scale[_AXES[attributes["stretch"]]] = 1.0
    # A torus is flat by itself: every solid is scaled to the same cube first.
    scale /= np.abs(points).max(axis=0)
    points, normals = points * scale, normals / scale
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    upright = make_rotation(yaw=rng.uniform(-0.25, 0.25), pitch=rng.uniform(-0.1, 0.1))
    points, normals = points @ upright.T, normals @ upright.T
    colour = vary_colour(attributes["color"], rng) / 255
    shaded = (
        _BRIGHT * colour
        + _LIT * (1 + normals @ _LIGHTS.T)
        + _GRADIENT * points
        + rng.normal(scale=_GRAIN, size=points.shape)
    )
    where = points + rng.normal(scale=0.005, size=points.shape) + rng.uniform(-0.5, 0.5, size=3)
    return np.concatenate([where, np.clip(shaded, 0, 1)], axis=1)


def encode_npy(values: np.ndarray) -> bytes:
    """Encode an array as `.npy` bytes, fp16."""
    out = io.BytesIO()
    np.save(out, values.astype(np.float16))
    return out.getvalue()


def render(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """Render a point-cloud sample."""
    return RenderedMedia({"point.npy": encode_npy(make_cloud(attributes, rng))})
