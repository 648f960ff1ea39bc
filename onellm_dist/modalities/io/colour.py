"""Colours of every kind of picture as 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

_LARGEST_16_BIT = 65535
_STRIP = 1 << 22
"""Pixels that are composited at once."""


def convert_to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB.

    | stored as | becomes |
    |---|---|
    | transparency of any kind | composited on white, as viewers and pages show it |
    | 16-bit grey | the upper 8 of its 16 bits |
    | 32-bit integers | as 16-bit grey within 0..65535, else their range stretched to 0..255 |
    | floats | times 255 within 0..1, as they are within 0..255, else stretched; NaN is 0 |
    | palette, 1 bit, CMYK, YCbCr, LAB, HSV | as Pillow converts them |

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
    grey = Image.fromarray(scale_to_bytes(np.asarray(picture)))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):  # a PNG names one grey that is transparent
        grey.paste(255, mask=Image.fromarray(np.asarray(picture) == transparent))
    return grey.convert("RGB")


def scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Scale numbers of a deep picture to 0..255, by the rules of `convert_to_rgb`.

    Args:
        values: [H, W], integers of 16 or 32 bits, or floats.

    Returns:
        [H, W] uint8.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        low = float(values.min(where=finite, initial=np.inf))
        high = float(values.max(where=finite, initial=-np.inf))
    else:
        low, high = float(values.min()), float(values.max())
        if low >= 0 and high <= _LARGEST_16_BIT:
            return (values >> 8).astype(np.uint8)
    if low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    return _stretch(values, low, high)


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
