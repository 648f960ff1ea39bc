"""A small orthographic ray caster for one solid.

It traces spheres, vectorised over the pixels of the solid's bounding square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onellm_dist.shards.sources.toyworld.solids import compute_distance

_REACH = 1.3
"""No part of a solid is farther from its centre than this many radii."""
_STEPS = 28
_HIT = 0.02
_NUDGE = 1e-3


@dataclass(frozen=True)
class SolidView:
    """What the camera sees of a solid, for the P pixels that show it.

    Attributes:
        rows: rows of the pixels, [P].
        columns: columns of the pixels, [P].
        height: distance of the surface from the solid's centre towards the viewer, in radii, [P].
        normals: outward normals; x right, y up, z to the viewer, [P, 3].
    """

    rows: np.ndarray
    columns: np.ndarray
    height: np.ndarray
    normals: np.ndarray


def cast_rays(
    solid: str, turn: np.ndarray, *, centre: tuple[float, float], radius: float, side: int
) -> SolidView:
    """Cast a ray through each pixel of a square picture, along -z.

    Args:
        solid: one of world.SOLIDS.
        turn: rotation from the solid's axes to the camera's, [3, 3].
        centre: x and y of the solid's centre in pixels (y points down).
        radius: pixels per radius.
        side: pixels per side of the picture.
    """
    reach = math.ceil(_REACH * radius)
    columns = np.arange(max(0, int(centre[0]) - reach), min(side, int(centre[0]) + reach + 1))
    rows = np.arange(max(0, int(centre[1]) - reach), min(side, int(centre[1]) + reach + 1))
    at_column, at_row = (grid.ravel() for grid in np.meshgrid(columns, rows))
    x, y = (at_column - centre[0]) / radius, (centre[1] - at_row) / radius
    near = x * x + y * y < _REACH * _REACH
    at_column, at_row, x, y = at_column[near], at_row[near], x[near], y[near]
    z = np.full(len(x), _REACH)
    gap = np.zeros(len(x))
    for _ in range(_STEPS):
        gap = compute_distance(solid, np.stack([x, y, z], axis=1) @ turn)
        z -= gap
    hit = (gap < _HIT) & (z > -_REACH)
    points = np.stack([x[hit], y[hit], z[hit]], axis=1) @ turn
    return SolidView(at_row[hit], at_column[hit], z[hit], _compute_normals(solid, points) @ turn.T)


def _compute_normals(solid: str, points: np.ndarray) -> np.ndarray:
    """Unit vectors along the gradient of the distance at points [P, 3] in the solid's axes."""
    steps = np.eye(3) * _NUDGE
    slopes = [
        compute_distance(solid, points + s) - compute_distance(solid, points - s) for s in steps
    ]
    gradient = np.stack(slopes, axis=1)
    return np.asarray(gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-9))
