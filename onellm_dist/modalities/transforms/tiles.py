"""Tiles of a large picture, as the any-resolution of LLaVA-NeXT cuts them (arXiv 2310.03744).

A grid of c x r tiles of 224 x 224 is chosen whose shape fits the picture: the one that keeps most
of its pixels, and of these the one that wastes the fewest. The picture is resized into the grid
with its aspect ratio, centred on black, and cut row by row. Before the tiles comes the whole
picture, pressed into one square. A picture that no grid shows better than one square has no tiles.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from PIL import Image

from onellm_dist.modalities.transforms.crops import SIDE


def choose_grid(width: int, height: int, tiles: Collection[int]) -> tuple[int, int]:
    """Choose columns and rows of the grid that shows a picture best.

    Args:
        width: of the picture; 0: not known.
        height: of the picture.
        tiles: how many tiles a grid may have; of grids that are equally good the first counts, in
            the order of tiles and then of columns.
    """
    best, chosen = (-1, 0), (1, 1)
    if width < 1 or height < 1:
        return chosen
    for count in sorted(tiles):
        for columns in range(1, count + 1):
            if count % columns:
                continue
            rows = count // columns
            full = SIDE * columns, SIDE * rows
            scale = min(full[0] / width, full[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            rating = kept, -(full[0] * full[1] - kept)
            if rating > best:
                best, chosen = rating, (columns, rows)
    return chosen


def cut_tiles(picture: Image.Image, tiles: int) -> list[Image.Image]:
    """Return the whole picture as a square, and its tiles.

    Args:
        picture: an RGB picture.
        tiles: how many tiles: the grid is the best one of so many.

    Returns:
        1 + tiles pictures of 224 x 224.
    """
    columns, rows = choose_grid(*picture.size, [tiles])
    full = SIDE * columns, SIDE * rows
    across, down = full[0] / picture.width, full[1] / picture.height
    if across < down:
        size = full[0], min(math.ceil(picture.height * across), full[1])
    else:
        size = min(math.ceil(picture.width * down), full[0]), full[1]
    canvas = Image.new("RGB", full)
    inside = picture.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(inside, ((full[0] - size[0]) // 2, (full[1] - size[1]) // 2))
    whole = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return [
        whole,
        *(
            canvas.crop((SIDE * c, SIDE * r, SIDE * (c + 1), SIDE * (r + 1)))
            for r in range(rows)
            for c in range(columns)
        ),
    ]
