"""Drawing for previews, with NumPy and Pillow alone.

Matplotlib takes a second to import and tens of milliseconds per picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_HEAT = ((13, 8, 40), (84, 15, 109), (187, 55, 84), (249, 142, 9), (252, 255, 164))
_SIGNED = ((33, 75, 160), (120, 170, 220), (245, 245, 245), (230, 150, 110), (170, 30, 40))
TRACE_COLOURS = ((214, 62, 62), (52, 152, 84), (52, 103, 201))


def _interpolate_colours(anchors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """[256, 3] uint8, linear between the anchors."""
    at = np.linspace(0, len(anchors) - 1, 256)
    return (
        np.stack([np.interp(at, range(len(anchors)), [a[c] for a in anchors]) for c in range(3)], 1)
        .round()
        .astype(np.uint8)
    )


def draw_heatmap(values: np.ndarray, size: tuple[int, int], *, signed: bool = False) -> Image.Image:
    """Draw numbers as colours.

    Args:
        values: [rows, columns].
        size: (width, height) of the picture in pixels.
        signed: if true, blue to red spans +-3 standard deviations around 0; otherwise dark to
            light spans the 1st to the 99.5th percentile.
    """
    if signed:
        high = 3 * float(values.std()) or 1.0
        low = -high
    else:
        low, high = (float(v) for v in np.percentile(values, (1, 99.5)))
    level = ((values - low) / ((high - low) or 1.0) * 255).clip(0, 255).astype(np.uint8)
    return Image.fromarray(_interpolate_colours(_SIGNED if signed else _HEAT)[level]).resize(
        size, Image.Resampling.BILINEAR
    )


def draw_traces(
    groups: Sequence[tuple[str, np.ndarray]], size: tuple[int, int] = (448, 224)
) -> Image.Image:
    """Draw lines in panels one above the other; each panel states the ends of its scale.

    Args:
        groups: title and [lines, N] of each panel.
        size: (width, height) of the picture in pixels.
    """
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    each = size[1] // len(groups)
    for i, (title, lines) in enumerate(groups):
        top, bottom = i * each + 14, (i + 1) * each - 6
        low, high = float(lines.min()), float(lines.max())
        scale = (bottom - top) / ((high - low) or 1.0)
        if low < 0 < high:
            draw.line(
                [(0, bottom + low * scale), (size[0], bottom + low * scale)], fill=(205, 205, 205)
            )
        across = np.linspace(0, size[0] - 1, lines.shape[1])
        for line, colour in zip(lines, TRACE_COLOURS, strict=False):
            draw.line(
                list(zip(across.tolist(), (bottom - (line - low) * scale).tolist(), strict=True)),
                fill=colour,
            )
        draw.text((4, i * each), f"{title}  {low:.3g} to {high:.3g}", fill=(60, 60, 60))
    return picture


def draw_cloud(points: np.ndarray, colours: np.ndarray, side: int = 336) -> Image.Image:
    """Draw a point cloud as seen from a corner, near points over far ones.

    Args:
        points: [N, 3], z up, at any scale.
        colours: [N, 3] in [0, 1].
        side: pixels per side of the picture.
    """
    centred = points - points.mean(0)
    turn, tilt = np.deg2rad(35), np.deg2rad(25)
    about = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    down = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    seen = centred @ about.T @ down.T  # x right, y away from the eye, z up
    reach = float(np.linalg.norm(centred, axis=1).max()) or 1.0
    column = ((seen[:, 0] / reach * 0.47 + 0.5) * (side - 1)).astype(np.int64)
    row = ((0.5 - seen[:, 2] / reach * 0.47) * (side - 1)).astype(np.int64)
    canvas = np.full((side, side, 3), 250, np.uint8)
    order = np.argsort(-seen[:, 1], kind="stable")
    paint = (colours[order] * 255).round().clip(0, 255).astype(np.uint8)
    # Each point paints 3 x 3 pixels, far points first, so that the nearest one stays.
    offsets = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    at = np.stack([row, column], 1)[order][:, None] + offsets
    canvas[at[..., 0].clip(0, side - 1), at[..., 1].clip(0, side - 1)] = paint[:, None]
    return Image.fromarray(canvas)


def make_thumbnail(picture: Image.Image, side: int) -> Image.Image:
    """Copy a picture and shrink it to fit into side x side pixels; it is never enlarged."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    return small


def join_pictures(pictures: list[Image.Image], gap: int = 4, *, down: bool = False) -> Image.Image:
    """Put pictures side by side on white, aligned at the top, `gap` pixels apart.

    Args:
        pictures: at least one.
        gap: pixels between two of them.
        down: whether they stand one above the other instead, aligned on the left.
    """
    if down:
        turned = [picture.transpose(Image.Transpose.TRANSPOSE) for picture in pictures]
        return join_pictures(turned, gap).transpose(Image.Transpose.TRANSPOSE)
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row
