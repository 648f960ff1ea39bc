"""The one way to open a picture: for building, de-duplication, previews, training and serving."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError, features

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.io.colour import convert_to_rgb
from onellm_dist.modalities.io.deep_colours import (
    brighten_dark_colours,
    find_deep_mode,
    note_white_level,
)
from onellm_dist.modalities.io.file_kinds import describe_damage
from onellm_dist.modalities.io.png_chunks import SIGNATURE, drop_metadata
from onellm_dist.modalities.library_faults import require_library
from onellm_dist.modalities.limits import LIMITS, Limits, check_size

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""Extensions of pictures. The bytes decide on the format, whatever the extension says."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are recognised by their first bytes.

Others of Pillow's are left out: some start programs (EPS), some have no mark of their own (TGA)."""
_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or PPM"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
_COSTLY_FORMATS = {"WEBP", "AVIF", "JPEG2000"}
_COSTLY_MODES = {"F", "I"}
_CODECS = {
    "jpg": (0, (b"\xff\xd8\xff",)),
    "zlib": (0, (SIGNATURE,)),
    "webp": (8, (b"WEBP",)),
    "libtiff": (0, (b"II*\0", b"MM\0*")),
    "avif": (4, (b"ftypavif", b"ftypavis")),
    "jpg_2000": (0, (b"\0\0\0\x0cjP  ", b"\xffO\xffQ\0\0\0\0")),
}
"""Codec that Pillow may be built without to where its pictures have which marks."""
ORIENTATION_TAG = 0x0112
"""EXIF: how stored pixels must be turned to be upright."""
_PNG_DEPTH = 24
"""Offset of the bits per sample in a PNG."""


@dataclass(frozen=True)
class UprightPicture:
    """A decoded picture as viewers show it, in the mode in which it was stored.

    Attributes:
        image: the picture, upright.
        orientation: EXIF orientation of the stored pixels, 1 to 8; 1 is upright.
        is_tagged: whether the file states its orientation, be it 1.
    """

    image: Image.Image
    orientation: int
    is_tagged: bool


def open_picture(part: Part, limits: Limits = LIMITS["image"]) -> UprightPicture:
    """Decode a picture and turn it upright.

    The bytes decide on the format. Of an animation or of several pages the first is taken. EXIF
    orientation is applied, because viewers and the people who captioned the picture saw it so; the
    reference ignores it. Texts and colour profiles decide nothing, whatever their size or state.

    Args:
        part: the file.
        limits: how large it may be; checked before pixels are decoded.

    Raises:
        SampleError: the bytes have another format, are cut short, or exceed the limits.
    """
    try:
        try:
            picture, orientation = _decode(part.data, part, limits)
        except SampleError:
            raise
        except Exception:
            if not part.data.startswith(SIGNATURE):
                raise
            pixels = drop_metadata(part.data)  # Pillow refuses a PNG for a text in it
            picture, orientation = _decode(pixels, part, limits)
    except SampleError:
        raise
    except Exception as error:  # Pillow's decoders raise anything (OSError, SyntaxError, ...)
        require_library(error)
        _require_codec(part.data)
        raise SampleError(
            f".{part.extension} ({len(part.data)} bytes) is not a readable {_NAMES}: "
            f"{_describe(error, part.data)}",
            "the sample has no picture.",
            "download or encode it again, or drop the sample.",
        ) from error
    return _turn_upright(picture, orientation)


def measure_picture(part: Part, limits: Limits = LIMITS["image"]) -> tuple[int, int]:
    """Read width and height of a picture as viewers show it, without decoding its pixels.

    Raises:
        SampleError: its header cannot be read, or it exceeds the limits.
    """
    try:
        with Image.open(io.BytesIO(part.data), formats=_FORMATS) as picture:
            check_size(_get_limits(limits, picture), *picture.size, f".{part.extension}")
            width, height = picture.size
            orientation = _read_orientation(picture)
    except SampleError:
        raise
    except Exception as error:  # as in `open_picture`
        require_library(error)
        raise SampleError(
            f".{part.extension} ({len(part.data)} bytes) has no readable header: "
            f"{_describe(error, part.data)}",
            "the size of the picture is not known.",
            "download or encode it again, or drop the sample.",
        ) from error
    return (height, width) if orientation in _SIDEWAYS else (width, height)


def _require_codec(data: bytes) -> None:
    """Raise OneLLMError if the installed Pillow was built without the codec of a picture."""
    for codec, (place, marks) in _CODECS.items():
        if data[place : place + len(marks[0])] in marks and not features.check(codec):
            raise OneLLMError(
                f"the installed Pillow {PIL.__version__} cannot read {codec.upper()} pictures",
                "every one of them would be called bad.",
                "pip install -U pillow: its wheels can (AVIF from 11.3 on).",
            )


def _describe(error: Exception, data: bytes = b"") -> str:
    if isinstance(error, UnidentifiedImageError):  # it prints the address of a buffer
        said = describe_damage(data, "picture")
        return said or "its first bytes are those of none of these, or its header is damaged"
    return str(error) or type(error).__name__


def _decode(data: bytes, part: Part, limits: Limits) -> tuple[Image.Image, int | None]:
    """The picture, and the orientation that Pillow applies by itself (to TIFF alone).

    `data` is the part's, as a rule.
    """
    picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    check_size(_get_limits(limits, picture), *picture.size, f".{part.extension}")
    form = picture.format
    applied = _read_orientation(picture) if form == "TIFF" else None
    note_white_level(picture, part.data)
    deep = find_deep_mode(picture)
    picture.load()
    if deep:
        bright = brighten_dark_colours(picture, data, _FORMATS, f".{part.extension}")
        if bright is not picture:
            return bright, applied
    if form == "PNG":
        _scale_transparent_colour(picture, data[_PNG_DEPTH])
    return picture, applied


def _get_limits(limits: Limits, picture: Image.Image) -> Limits:
    """Halve the pixels for what takes twice the memory while it is decoded."""
    is_costly = picture.format in _COSTLY_FORMATS or picture.mode in _COSTLY_MODES
    return replace(limits, pixels=limits.pixels / 2) if is_costly else limits


def _scale_transparent_colour(picture: Image.Image, depth: int) -> None:
    """Scale the colour that a PNG calls transparent as Pillow scales its pixels to 8 bits."""
    colour = picture.info.get("transparency")
    if depth in (2, 4) and isinstance(colour, int) and picture.mode == "L":
        picture.info["transparency"] = colour * (255 // (2**depth - 1))
    elif depth == 16 and isinstance(colour, tuple):
        picture.info["transparency"] = tuple(value >> 8 for value in colour)


def _turn_upright(picture: Image.Image, applied: int | None) -> UprightPicture:
    stated = _read_orientation(picture) if applied is None else applied
    orientation = stated if stated in _UPRIGHT else 1
    if applied is None:
        picture = turn_picture(picture, orientation)
    return UprightPicture(picture, orientation, is_tagged=stated is not None)


def turn_picture(picture: Image.Image, orientation: int) -> Image.Image:
    """Turn stored pixels upright; `orientation` is EXIF's, 1 to 8."""
    turn = _UPRIGHT.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def turn_back(picture: Image.Image, orientation: int) -> Image.Image:
    """Turn an upright picture to the pixels that are stored; the inverse of `turn_picture`."""
    return turn_picture(picture, {6: 8, 8: 6}.get(orientation, orientation))


def _read_orientation(picture: Image.Image) -> int | None:
    try:
        found = picture.getexif().get(ORIENTATION_TAG)
        return None if found is None else int(found)
    except Exception:  # unreadable metadata of a readable picture: show it as stored, as viewers do
        return None


def decode_picture(part: Part, limits: Limits = LIMITS["image"]) -> Image.Image:
    """Decode a picture to upright 8-bit RGB (see `open_picture` and `colour.convert_to_rgb`).

    Raises:
        SampleError: as in `open_picture`.
    """
    return convert_to_rgb(open_picture(part, limits).image)


def encode_picture(picture: Image.Image) -> Part:
    """Encode an RGB picture as a file without loss, and without what is said of it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PPM")
    return Part("ppm", buffer.getvalue())


def make_rgb_picture(item: Any, limits: Limits = LIMITS["image"]) -> Any:
    """Convert a picture that a program holds as `decode_picture` converts a file.

    Args:
        item: a `PIL.Image` of any mode, or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (or
            with the bands first) of uint8, of floats from 0 to 1, or of uint16 if [H, W]; anything
            else is returned as it is.
        limits: how large it may be.

    Raises:
        SampleError: the array is not such a picture, or it exceeds the limits.
    """
    held = make_upright_picture(item, limits)
    return item if held is None else convert_to_rgb(held.image)


def make_upright_picture(item: Any, limits: Limits = LIMITS["image"]) -> UprightPicture | None:
    """Turn a picture that a program holds upright, as `open_picture` does a file.

    Args:
        item: as of `make_rgb_picture`.
        limits: how large it may be.

    Returns:
        The picture in its own mode; None if the item is not a picture.

    Raises:
        SampleError: as of `make_rgb_picture`.
    """
    if isinstance(item, np.ndarray):
        item = _make_picture(item)
    if not isinstance(item, Image.Image):
        return None
    check_size(limits, *item.size, "the picture")
    try:
        item.load()
    except Exception as error:  # opened, but not yet decoded
        raise SampleError(
            f"the picture cannot be decoded: {_describe(error)}",
            "there is nothing to show the model.",
            "give another, or name its file.",
        ) from error
    return _turn_upright(item, None)


def _make_picture(array: np.ndarray) -> Image.Image:
    pixels = _put_bands_last(array)
    if pixels.dtype.kind == "f" and pixels.size and _is_within_unit(pixels):
        pixels = np.rint(pixels * 255).astype(np.uint8)
    grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    deep = grey.dtype == np.uint16 and grey.ndim == 2
    bands = grey.ndim == 2 or (grey.ndim == 3 and grey.shape[2] in (3, 4))
    if not deep and not (grey.dtype == np.uint8 and bands):
        raise SampleError(
            f"an array of {array.dtype} and shape {array.shape} is not a picture",
            "pictures are [height, width, 3] of uint8, or of floats from 0 to 1; 4 bands have "
            "opacity, 1 is grey.",
            "convert it, or give a PIL.Image.",
        )
    return Image.fromarray(np.ascontiguousarray(grey))


def _put_bands_last(array: np.ndarray) -> np.ndarray:
    """[H, W, bands] of [bands, H, W], as torch has pictures; others are as they are."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        return array.transpose(1, 2, 0)
    return array


def _is_within_unit(values: np.ndarray) -> bool:
    """Whether all values lie within 0 and 1, which those of 0 to 255 do not; NaN does not."""
    return bool((values >= 0).all() and (values <= 1).all())
