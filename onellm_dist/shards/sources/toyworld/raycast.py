"""A small orthographic ray caster: sphere tracing of one solid, vectorised over the pixels of its bounding square."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onellm_dist.shards.sources.toyworld.solids import compute_distance

_REACH = 1.3
"""No solid is farther from its centre than this many radii."""
_STEPS = 28
_HIT = 0.02
_NUDGE = 1e-3


@dataclass(frozen=True)
class SolidView:
    """What the camera sees of a solid.

    Attributes:
        rows, columns: pixels that show it, [P] each.
        height: how far its surface stands towards the viewer from its centre, in radii, [P].
        normals: outward, x right, y up, z to the viewer, [P, 3].
    """

    rows: np.ndarray
    columns: np.ndarray
    height: np.ndarray
    normals: np.ndarray


def cast_rays(
    solid: str, turn: np.ndarray, *, center: tuple[float, float], radius: float, side: int
) -> SolidView:
    """Cast a ray through each pixel of a square picture, along -z.

    Args:
        solid: one of world.SOLIDS.
        turn: [3, 3], from the solid's axes to the camera's.
        center: x and y of the solid's centre, pixels (y downwards).
        radius: pixels a radius.
        side: of the picture, pixels.
    """
    reach = math.ceil(_REACH * radius)
    columns = np.arange(max(0, int(center[0]) - reach), min(side, int(center[0]) + reach + 1))
    rows = np.arange(max(0, int(center[1]) - reach), min(side, int(center[1]) + reach + 1))
    at_column, at_row = (grid.ravel() for grid in np.meshgrid(columns, rows))
    x, y = (at_column - center[0]) / radius, (center[1] - at_row) / radius
    near = x * x + y * y < _REACH * _REACH
    at_column, at_row, x, y = at_column[near], at_row[near], x[near], y[near]
    z = np.full(len(x), _REACH)
    gap = np.zeros(len(x))
    for _ in range(_STEPS):
        gap = compute_distance(solid, np.stack([x, y, z], axis=1) @ turn)
        z -= gap
    hit = (gap < _HIT) & (z > -_REACH)
    points = np.stack([x[hit], y[hit], z[hit]], axis=1) @ turn
    return SolidView(at_row[hit], at_column[hit], z[hit], _normals(solid, points) @ turn.T)


def _normals(solid: str, points: np.ndarray) -> np.ndarray:
    """Gradient of the distance at points [P, 3] in the solid's axes, as unit vectors."""
    steps = np.eye(3) * _NUDGE
    gradient = np.stack(
        [compute_distance(solid, points + s) - compute_distance(solid, points - s) for s in steps],
        axis=1,
    )
    return gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-9)
