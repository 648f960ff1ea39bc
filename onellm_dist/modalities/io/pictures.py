"""What image, video, depth and normal share: reading pictures, crops, and CLIP's normalisation."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Part

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SIDE = 224
"""Pixels a side of the encoder's input; it has no other size (its positions are not interpolated)."""
PATCHES = (SIDE // 14) ** 2
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MEAN, _STD = (np.array(v, np.float32)[:, None] for v in (CLIP_MEAN, CLIP_STD))
_NORMALISED = ((np.arange(256, dtype=np.float32) / np.float32(255)) - _MEAN) / _STD
"""[3, 256]: each channel's normalised value of a byte."""
_WIDEST = 100
"""Long over short side from which a picture is first cut to its middle, for the memory's sake."""
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

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""


def open_picture(part: Part) -> Image.Image:
    """A JPEG, PNG or WebP, decoded, upright, in the mode it was stored in. Of an animation, the first frame.

    EXIF orientation is applied (viewers and the people who captioned the picture saw it so; the reference ignores it).

    Raises:
        SampleError: it is none of these, is cut short, or is larger than Pillow's limit against decompression bombs.
    """
    try:
        picture = Image.open(io.BytesIO(part.data), formats=("JPEG", "PNG", "WEBP"))
        picture.load()
    except Exception as error:  # Pillow's decoders raise anything on broken bytes (OSError, SyntaxError, struct.error ...)
        raise SampleError(
            f".{part.extension} ({len(part.data)} bytes) is no readable JPEG, PNG or WebP: {error or type(error).__name__}",
            "the sample has no picture.",
            "download or encode it again, or drop the sample.",
        ) from error
    turn = _UPRIGHT.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except (
        Exception
    ):  # unreadable metadata of a readable picture: it is shown as stored, as viewers do
        return 1


def decode_picture(part: Part) -> Image.Image:
    """The picture as 8-bit RGB: transparency is dropped, 16 bits are cut to their upper 8.

    Raises:
        SampleError: as `open_picture`.
    """
    picture = open_picture(part)
    if picture.mode.startswith(
        "I"
    ):  # 16-bit grey; Pillow's own conversion would clip everything above 255
        picture = Image.fromarray(
            (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        )
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def normalise(picture: Image.Image | np.ndarray) -> torch.Tensor:
    """RGB picture, or its [height, width, 3] bytes -> [3, height, width] fp32 with CLIP's mean and standard deviation."""
    pixels = np.asarray(picture)
    out = np.empty((3, *pixels.shape[:2]), np.float32)
    for channel in range(3):
        np.take(_NORMALISED[channel], pixels[..., channel], out=out[channel])
    return torch.from_numpy(out)


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A crop of 0.9 to 1 of the area and 3/4 to 4/3 in shape, as torchvision's RandomResizedCrop draws it.

    Ten tries, then the largest crop in the middle whose shape is within the limits.
    """
    area, limits = width * height, (0.75, 1.3333)
    for _ in range(10):
        target = area * rng.uniform(0.9, 1.0)
        shape = math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < limits[0]:
        h = round(width / limits[0])
    elif width / height > limits[1]:
        w = round(height * limits[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_train(picture: Image.Image, box: Box) -> np.ndarray:
    """The box of the picture as [224, 224, 3] uint8, bicubic with antialiasing.

    torch's resize of bytes, three times as fast as Pillow's, which evaluation keeps: no pixel differs from Pillow's by more than
    2 of 255, and 1 in 100 at all (torch 2.15, Pillow 13). Both round and clip between the two directions, the horizontal one
    first; only where the height shrinks much more than the width, Pillow 13 (its pull request 9549) turns them round, which
    shows at hard edges.
    """
    left, top, right, bottom = box
    pixels = torch.from_numpy(np.asarray(picture)[top:bottom, left:right].copy()).permute(
        2, 0, 1
    )  # copied: Pillow's is read-only
    resized = functional.interpolate(
        pixels[None], size=(SIDE, SIDE), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


def crop_eval(picture: Image.Image) -> Image.Image:
    """Short side to 224 (bicubic), then the middle 224 x 224, with torchvision's roundings."""
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    if long > _WIDEST * short:
        cut = (long - _WIDEST * short) // 2
        picture = picture.crop(
            (cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut)
        )
        long = max(picture.size)
    scaled = int(SIDE * long / short)
    size = (SIDE, scaled) if width <= height else (scaled, SIDE)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    return picture.crop((left, top, left + SIDE, top + SIDE))


def thumbnail(picture: Image.Image, side: int) -> Image.Image:
    """A copy that fits into side x side pixels, never enlarged."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    return small


def beside(pictures: list[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures in a row on white, top-aligned."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row
