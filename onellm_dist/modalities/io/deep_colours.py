"""Which value of a picture of more than 8 bits is white, and dark colours of 16 bits.

Pillow keeps the upper 8 bits of 16-bit colours, so that 12-bit colours stored in 16 bits would
come out nearly black. Their lower 8 bits are read too.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.io.colour import (
    WHITE_LEVEL,
    choose_white_level,
    get_white_level,
    scale_levels,
)
from onellm_dist.modalities.io.png_chunks import SIGNATURE, read_significant_bits

_BITS_PER_SAMPLE, _LARGEST_SAMPLE = 258, 341
_DARK = 64
"""Upper bytes below this are those of at most 14 bits."""
_NATIVE = "L" if sys.byteorder == "little" else "B"
_STRIP = 1 << 22
_GREY_WITH_OPACITY = "LA;16B"
"""Pillow reads it as RGBA, from PNG alone."""


def note_white_level(picture: Image.Image, data: bytes) -> None:
    """Put what a file says of its white into `picture.info`, if it says anything.

    A PNG has its number of significant bits (sBIT), a TIFF its largest sample (SMaxSampleValue)
    and its bits per sample, where these are not 8 or 16; a PGM its maximum, which Pillow scales by.

    Args:
        picture: an opened picture, loaded or not.
        data: its file.
    """
    picture.info.pop(WHITE_LEVEL, None)
    bits: int | None = None
    if picture.format == "PPM":
        picture.info[WHITE_LEVEL] = 65535
        return
    if data.startswith(SIGNATURE):
        bits = max(read_significant_bits(data)[:3], default=None)
    elif isinstance(picture, TiffImagePlugin.TiffImageFile):
        largest = _read_tag(picture, _LARGEST_SAMPLE)
        if largest and all(0 < v <= 65535 and v == int(v) for v in largest):
            picture.info[WHITE_LEVEL] = int(max(largest))
            return
        bits = int(max(_read_tag(picture, _BITS_PER_SAMPLE), default=0))
    if bits is not None and 8 < bits < 16:
        picture.info[WHITE_LEVEL] = (1 << bits) - 1


def find_deep_mode(picture: Image.Image) -> str:
    """How an opened picture stores several bands of 16 bits, as `RGB;16B`; empty: it has none."""
    tiles = getattr(picture, "tile", None)
    mode = _split_arguments(tiles[0].args)[0] if tiles else ""
    return mode if ";16" in mode and picture.mode in ("RGB", "RGBA", "LA") else ""


def _split_arguments(arguments: Any) -> tuple[str, tuple[Any, ...]]:
    """The raw mode of a tile, and its decoder's other arguments."""
    first, *more = arguments if isinstance(arguments, tuple) and arguments else (arguments,)
    return str(first), tuple(more)


def _read_tag(picture: TiffImagePlugin.TiffImageFile, tag: int) -> tuple[float, ...]:
    try:
        found = picture.tag_v2.get(tag, ())
        return tuple(float(v) for v in (found if isinstance(found, tuple) else (found,)))
    except Exception:  # a tag that is damaged says nothing
        return ()


def brighten_dark_colours(
    picture: Image.Image, data: bytes, formats: tuple[str, ...], name: str
) -> Image.Image:
    """Show 10-, 12- and 14-bit colours that are stored in 16 bits as bright as they are.

    Args:
        picture: a loaded picture of the upper 8 bits of 16-bit colours: RGB, RGBA or LA.
        data: its file.
        formats: the formats that Pillow may take it for.
        name: what errors call it.

    Returns:
        A picture of the same mode and info; the same one if its colours are bright.

    Raises:
        SampleError: they are dark, and Pillow gives their upper 8 bits alone.
    """
    colours = range(1 if picture.mode == "LA" else 3)
    if max(int(np.asarray(picture.getchannel(i)).max()) for i in colours) >= _DARK:
        return picture
    lower = _load_lower_bytes(data, formats)
    if lower is None or lower.size != picture.size:
        raise SampleError(
            f"{name} has 16 bits, and none of its colours reaches {_DARK << 8:,}",
            "they may be of 8 to 14 bits, and would come out nearly black.",
            "store it without opacity, or in 8 bits.",
        )
    largest = max(int(strip.max()) for i in colours for strip in _join_bytes(picture, lower, i))
    white = choose_white_level(largest, get_white_level(picture.info))
    bands = [
        Image.fromarray(
            np.concatenate([scale_levels(strip, white) for strip in _join_bytes(picture, lower, i)])
        )
        for i in colours
    ]
    del lower
    bands += [picture.getchannel(i) for i in range(len(colours), len(picture.getbands()))]
    bright = Image.merge(picture.mode, bands)
    bright.info = dict(picture.info)
    bright.format = picture.format
    colour = bright.info.get("transparency")
    if isinstance(colour, tuple):
        scaled = scale_levels(np.array([colour]), white)
        bright.info["transparency"] = tuple(int(value) for value in scaled[0])
    return bright


def _load_lower_bytes(data: bytes, formats: tuple[str, ...]) -> Image.Image | None:
    """Load the lower 8 bits of 16-bit colours, as if their bytes had the other order.

    Grey with opacity becomes RGBA of the lower 8 bits of grey. None: Pillow cannot (colours that
    are mixed with their opacity).
    """
    picture = Image.open(io.BytesIO(data), formats=formats)
    if picture.mode == "RGBA" and [tile.args for tile in picture.tile] == [_GREY_WITH_OPACITY]:
        picture.tile = [picture.tile[0]._replace(args="RGBA")]  # the four bytes of a pixel
        return Image.merge("RGBA", [picture.getchannel(1)] * 4)
    tiles = []
    for tile in picture.tile:
        mode, more = _split_arguments(tile.args)
        kind, _, order = mode.partition(";16")
        order = _NATIVE if order == "N" else order
        if order not in ("B", "L") or kind not in ("RGB", "RGBA", "RGBX"):
            return None
        swapped = f"{kind};16{'L' if order == 'B' else 'B'}"
        tiles.append(tile._replace(args=(swapped, *more) if more else swapped))
    picture.tile = tiles
    picture.load()
    return picture


def _join_bytes(upper: Image.Image, lower: Image.Image, band: int) -> Iterator[np.ndarray]:
    """Yield strips [h, W] of uint16 of one band, from two pictures of 8 bits."""
    high, low = upper.getchannel(band), lower.getchannel(band)
    rows = max(1, _STRIP // high.width)
    for top in range(0, high.height, rows):
        box = (0, top, high.width, min(top + rows, high.height))
        yield np.asarray(high.crop(box)).astype(np.uint16) << 8 | np.asarray(low.crop(box))
