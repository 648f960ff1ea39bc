"""Solids of about radius 1: distance functions for the ray caster, surfaces for point clouds.

Axes: x to the right, y up, z to the viewer. Cone, cylinder and torus have their axis along y.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_CUBE = 0.72
_CONE_BASE = 0.85
_CONE_HALF = 0.9
_CYLINDER_RADIUS = 0.6
_CYLINDER_HALF = 0.85
_RING = 0.72
_TUBE = 0.27


def compute_distance(solid: str, points: np.ndarray) -> np.ndarray:
    """Compute the signed distance from points to a solid's surface, negative inside.

    Outside the cone it is a lower bound.

    Args:
        solid: one of world.SOLIDS.
        points: [..., 3].

    Returns:
        [...].
    """
    return _DISTANCES[solid](points[..., 0], points[..., 1], points[..., 2])


def _sphere(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(x * x + y * y + z * z) - 1.0)


def _cube(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    dx, dy, dz = np.abs(x) - _CUBE, np.abs(y) - _CUBE, np.abs(z) - _CUBE
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2 + np.maximum(dz, 0) ** 2)
    return np.asarray(outside + np.minimum(np.maximum(np.maximum(dx, dy), dz), 0))


def _cone(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    # Distance to the planes of mantle and base in the (radius, height) half plane. The rim is not
    # rounded.
    slope = math.atan2(_CONE_BASE, 2 * _CONE_HALF)
    radius = np.sqrt(x * x + z * z)
    mantle = radius * math.cos(slope) + (y - _CONE_HALF) * math.sin(slope)
    return np.asarray(np.maximum(mantle, -_CONE_HALF - y))


def _cylinder(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    side, cap = np.sqrt(x * x + z * z) - _CYLINDER_RADIUS, np.abs(y) - _CYLINDER_HALF
    outside = np.sqrt(np.maximum(side, 0) ** 2 + np.maximum(cap, 0) ** 2)
    return np.asarray(np.minimum(np.maximum(side, cap), 0) + outside)


def _torus(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    around = np.sqrt(x * x + z * z) - _RING
    return np.asarray(np.sqrt(around * around + y * y) - _TUBE)


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cone": _cone,
    "cylinder": _cylinder,
    "torus": _torus,
}


def sample_surface(
    solid: str, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sample points evenly over a solid's surface.

    Returns:
        Points [count, 3] and their outward normals [count, 3], fp64.
    """
    return _SAMPLERS[solid](count, rng)


def _sample_sphere(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    normals = rng.normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return normals, normals


def _sample_cube(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    points = rng.uniform(-_CUBE, _CUBE, size=(count, 3))
    axis, sign = rng.integers(3, size=count), rng.choice((-1.0, 1.0), size=count)
    normals = np.zeros((count, 3))
    rows = np.arange(count)
    normals[rows, axis] = sign
    points[rows, axis] = sign * _CUBE
    return points, normals


def _sample_cone(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    slope = math.atan2(_CONE_BASE, 2 * _CONE_HALF)
    slant = math.hypot(_CONE_BASE, 2 * _CONE_HALF)
    on_base = rng.uniform(size=count) < _CONE_BASE / (_CONE_BASE + slant)
    turn = rng.uniform(0, 2 * math.pi, size=count)
    # Both the base disc and the mantle grow linearly with the radius.
    radius = _CONE_BASE * np.sqrt(rng.uniform(size=count))
    height = np.where(on_base, -_CONE_HALF, _CONE_HALF * (1 - 2 * radius / _CONE_BASE))
    outward, up = np.where(on_base, 0.0, math.cos(slope)), np.where(on_base, -1.0, math.sin(slope))
    return _revolve(radius, height, turn), _revolve(outward, up, turn)


def _sample_cylinder(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    on_cap = rng.uniform(size=count) < _CYLINDER_RADIUS / (_CYLINDER_RADIUS + 2 * _CYLINDER_HALF)
    turn, side = rng.uniform(0, 2 * math.pi, size=count), rng.choice((-1.0, 1.0), size=count)
    radius = np.where(on_cap, _CYLINDER_RADIUS * np.sqrt(rng.uniform(size=count)), _CYLINDER_RADIUS)
    height = np.where(
        on_cap, side * _CYLINDER_HALF, rng.uniform(-_CYLINDER_HALF, _CYLINDER_HALF, size=count)
    )
    return _revolve(radius, height, turn), _revolve(
        np.where(on_cap, 0.0, 1.0), np.where(on_cap, side, 0.0), turn
    )


def _sample_torus(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    turn = rng.uniform(0, 2 * math.pi, size=count)
    # The area at tube angle a is proportional to ring + tube cos a: draw too many, then reject.
    angles = rng.uniform(0, 2 * math.pi, size=4 * count)
    accepted = rng.uniform(size=4 * count) * (_RING + _TUBE) < _RING + _TUBE * np.cos(angles)
    kept = angles[accepted][:count]
    outward, up = np.cos(kept), np.sin(kept)
    return _revolve(_RING + _TUBE * outward, _TUBE * up, turn), _revolve(outward, up, turn)


def _revolve(radius: np.ndarray, height: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Rotate (distance from the y axis, height) about the axis: [n, 3]."""
    return np.stack(
        [radius * np.cos(turn), np.broadcast_to(height, turn.shape), radius * np.sin(turn)], axis=1
    )


_SAMPLERS: dict[str, Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]] = {
    "sphere": _sample_sphere,
    "cube": _sample_cube,
    "cone": _sample_cone,
    "cylinder": _sample_cylinder,
    "torus": _sample_torus,
}


def make_rotation(*, pitch: float = 0.0, yaw: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """Make the matrix [3, 3] that rotates a solid.

    It rotates by yaw about y, then by pitch about x (its top moves to the viewer), then by roll
    about z, all in radians.
    """
    cp, sp = math.cos(pitch), math.sin(pitch)
    cy, sy = math.cos(yaw), math.sin(yaw)
    cr, sr = math.cos(roll), math.sin(roll)
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_x @ about_y)
