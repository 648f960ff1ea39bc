"""Flat coloured shapes on a constant background, for images and video frames."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

BACKGROUND = (123, 117, 104)
"""CLIP's mean colour.

It becomes zero in the model's input, so that empty patches carry nothing but their position."""
PALETTE = {
    "red": (215, 45, 40),
    "green": (45, 165, 65),
    "blue": (45, 75, 215),
    "yellow": (235, 215, 45),
    "purple": (165, 45, 190),
    "cyan": (50, 205, 220),
}
_OVERSAMPLE = 4


def vary_colour(colour: str, rng: np.random.Generator) -> np.ndarray:
    """Vary a named colour a little in brightness and in each channel: [3] fp64 in 0..255."""
    pure = np.array(PALETTE[colour], dtype=np.float64)
    return np.clip(pure * rng.uniform(0.85, 1.08) + rng.uniform(-8, 8, size=3), 0, 255)


def paint_shape(
    canvas: np.ndarray,
    shape: str,
    *,
    centre: tuple[float, float],
    radius: float,
    angle: float,
    colour: np.ndarray,
) -> None:
    """Paint an anti-aliased shape; what lies outside the canvas is cut off.

    Args:
        canvas: [H, W, 3] uint8; it is changed.
        shape: one of world.SHAPES.
        centre: x and y in pixels, with fractions.
        radius: radius of a circle of about the shape's size, in pixels.
        angle: rotation in degrees.
        colour: [3] in 0..255.
    """
    height, width = canvas.shape[:2]
    reach = math.ceil(1.3 * radius) + 1
    left, top = math.floor(centre[0]) - reach, math.floor(centre[1]) - reach
    side = 2 * reach + 1
    mask = _draw_mask(shape, side, (centre[0] - left, centre[1] - top), radius, angle)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    if x0 >= x1 or y0 >= y1:
        return
    alpha = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
    region = canvas[y0:y1, x0:x1]
    region[:] = np.rint(region + alpha * (colour - region)).astype(np.uint8)


def _draw_mask(
    shape: str, side: int, centre: tuple[float, float], radius: float, angle: float
) -> np.ndarray:
    """Draw the coverage of each pixel, [side, side] fp64 in 0..1."""
    scale = _OVERSAMPLE
    picture = Image.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(picture)
    cx, cy, r = centre[0] * scale, centre[1] * scale, radius * scale
    if shape == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    else:
        turn = math.radians(angle)
        corners = [
            (
                cx + r * (x * math.cos(turn) - y * math.sin(turn)),
                cy + r * (x * math.sin(turn) + y * math.cos(turn)),
            )
            for x, y in _OUTLINES[shape]
        ]
        draw.polygon(corners, fill=255)
    return np.asarray(picture.reduce(scale), dtype=np.float64) / 255


def _make_star() -> list[tuple[float, float]]:
    radii = [1.25 if i % 2 == 0 else 0.5 for i in range(10)]
    return [
        (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)
    ]


def _make_cross() -> list[tuple[float, float]]:
    a, b = 0.36, 1.1
    # fmt: off
    return [
        (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
        (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
    ]
    # fmt: on


_OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.2), (1.05, 0.75), (-1.05, 0.75)],
    "star": _make_star(),
    "cross": _make_cross(),
}
"""Corners of the shapes of radius 1; y points down."""
