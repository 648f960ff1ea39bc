"""Decoding of pictures (JPEG, PNG, WebP), for images, depth maps and normal maps."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Part

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def open_picture(part: Part) -> Image.Image:
    """Decode a JPEG, PNG or WebP and turn it upright, in the mode it was stored in.

    Of an animation the first frame is returned. EXIF orientation is applied, because viewers and
    the people who captioned the picture saw it so; the reference ignores it.

    Raises:
        SampleError: the bytes have another format, are cut short, or the picture is larger than
            Pillow's limit against decompression bombs.
    """
    try:
        picture = Image.open(io.BytesIO(part.data), formats=("JPEG", "PNG", "WEBP"))
        picture.load()
    except Exception as error:  # Pillow's decoders raise anything (OSError, SyntaxError, ...)
        raise SampleError(
            f".{part.extension} ({len(part.data)} bytes) is not a readable JPEG, PNG or WebP: "
            f"{error or type(error).__name__}",
            "the sample has no picture.",
            "download or encode it again, or drop the sample.",
        ) from error
    turn = _UPRIGHT.get(_read_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _read_orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # unreadable metadata of a readable picture: show it as stored, as viewers do
        return 1


def decode_picture(part: Part) -> Image.Image:
    """Decode a picture to 8-bit RGB: transparency is dropped, 16 bits are cut to their upper 8.

    Raises:
        SampleError: as in `open_picture`.
    """
    picture = open_picture(part)
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's conversion clips all above 255
        upper = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255)
        picture = Image.fromarray(upper.astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")
