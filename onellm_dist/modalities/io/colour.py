"""Colours of every kind of picture as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from onellm_dist.modalities.io.damage import note_assumption

WHITE_LEVEL = "white_level"
"""Key of `Image.info`: the value that the file calls white, if it states one."""
_DEPTHS = (1, 2, 4, 8, 10, 12, 14, 16)
"""Bits a value that cameras, scanners and programs write."""
_LARGEST_16_BIT = 65535
_STRIP = 1 << 22
"""Pixels that are composited at once."""


def convert_to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB.

    | stored as | becomes |
    |---|---|
    | transparency of any kind | composited on white, as viewers and pages show it |
    | 16-bit grey | the upper 8 of its bits; which is the uppermost, see below |
    | 32-bit integers | as 16-bit grey within 0..65535, else their range stretched to 0..255 |
    | floats | times 255 within 0..1, as they are within 0..255, else stretched; NaN is 0 |
    | palette, 1 bit, CMYK, YCbCr, LAB, HSV | as Pillow converts them |

    *White.* Cameras and scanners store 10, 12 or 14 bits in 16, so that white is not 65535. The
    file's own statement decides (see `pictures`); without one, the fewest of 1, 2, 4, 8, 10, 12, 14
    or 16 bits that hold the picture's largest value, and that is noted.

    Args:
        picture: a loaded picture; it is not changed.
    """
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith(("I", "F")):
        return _convert_deep(picture)
    if picture.has_transparency_data:
        return _put_on_white(picture)
    return picture.convert("RGB")


def _convert_deep(picture: Image.Image) -> Image.Image:
    """Convert 16- and 32-bit grey; Pillow's own conversion clips all above 255."""
    values = np.asarray(picture)
    grey = Image.fromarray(scale_to_bytes(values, get_white_level(picture.info)))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):  # a PNG names one grey that is transparent
        grey.paste(255, mask=Image.fromarray(values == transparent))
    return grey.convert("RGB")


def get_white_level(info: Mapping[Any, Any]) -> int | None:
    """The value that a picture's file calls white; None if it states none."""
    level = info.get(WHITE_LEVEL)
    return level if isinstance(level, int) else None


def choose_white_level(largest: int, stated: int | None) -> int:
    """Choose the value that is shown as white; a guess is noted.

    Args:
        largest: the largest value of the picture, 0 to 65535.
        stated: what the file calls white; it decides if no value exceeds it.
    """
    if stated is not None and largest <= stated:
        return stated
    bits = next(depth for depth in _DEPTHS if largest < 1 << depth)
    if largest > 0 and bits < 16:
        note_assumption(
            f"16-bit values of at most {largest:,} are taken as {bits} bits (white is "
            f"{(1 << bits) - 1:,})"
        )
    return (1 << bits) - 1


def scale_to_bytes(values: np.ndarray, stated: int | None = None) -> np.ndarray:
    """Scale numbers of a deep picture to 0..255, by the rules of `convert_to_rgb`.

    Args:
        values: [H, W], integers of 16 or 32 bits, or floats.
        stated: what the file calls white, if it states it.

    Returns:
        [H, W] uint8.
    """
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        low = float(values.min(where=finite, initial=np.inf))
        high = float(values.max(where=finite, initial=-np.inf))
        if low >= 0 and high <= 255:
            low, high = 0.0, 1.0 if high <= 1 else 255.0
        return _stretch(values, low, high)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _LARGEST_16_BIT:
        return _stretch(values, low, high)
    return scale_levels(values, choose_white_level(high, stated))


def scale_levels(values: np.ndarray, white: int) -> np.ndarray:
    """Scale integers of 0 to `white` to 0..255; of full 16 bits the upper 8 are kept.

    Args:
        values: [H, W], integers.
        white: the value that becomes 255.

    Returns:
        [H, W] uint8.
    """
    if white == _LARGEST_16_BIT:
        return (values >> 8).astype(np.uint8)
    return _stretch(values, 0, white)


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..255 as uint8, strip by strip; what is not finite becomes 0."""
    scaled = np.zeros(values.shape, np.uint8)
    rows = max(1, _STRIP // values.shape[1])
    for top in range(0, len(values), rows):
        strip = values[top : top + rows].astype(np.float64)
        numbers = np.round((strip - low) * (255 / ((high - low) or 1.0)))
        np.copyto(scaled[top : top + rows], numbers, where=np.isfinite(strip), casting="unsafe")
    return scaled


def _put_on_white(picture: Image.Image) -> Image.Image:
    """Composite on white, strip by strip: RGBA of a whole large picture would take its memory."""
    page = Image.new("RGB", picture.size, "white")
    rows = max(1, _STRIP // picture.width)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        colours = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        page.paste(colours, (0, top), mask=colours.getchannel("A"))
    return page
