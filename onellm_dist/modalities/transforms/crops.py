"""Crops of pictures to 224 x 224, and CLIP's normalisation (image, video, depth, normal)."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from onellm_dist.common.errors import OneLLMError

SIDE = 224
"""Pixels per side of the encoder's input. It has no other size: its positions are not resized."""
PATCHES = (SIDE // 14) ** 2
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MEAN = np.array(CLIP_MEAN, np.float32)[:, None]
_STD = np.array(CLIP_STD, np.float32)[:, None]
_NORMALISED = ((np.arange(256, dtype=np.float32) / np.float32(255)) - _MEAN) / _STD
"""[3, 256]: the normalised value of each byte, per channel."""
LARGEST = float(np.abs(_NORMALISED).max())
"""The largest absolute value of a normalised byte."""
_WIDEST = 100
"""Ratio of long to short side above which a picture is cut to its middle first, to save memory."""
_STRIP = 1 << 22
"""Pixels of a large picture that are copied at once."""

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""


def split_channels(picture: Image.Image | np.ndarray) -> torch.Tensor:
    """An RGB picture, or its bytes [height, width, 3], as [3, height, width] uint8."""
    pixels = picture if isinstance(picture, np.ndarray) else np.array(picture)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_pixels(pixels: torch.Tensor) -> None:
    """Refuse what is not RGB of 8 bits: other channels and numbers have no CLIP normalisation.

    Raises:
        OneLLMError: the tensor is not [..., 3, height, width] of uint8.
    """
    shape = tuple(pixels.shape)
    if pixels.dtype != torch.uint8 or shape[-3:-2] != (3,):
        raise OneLLMError(
            f"pixels are {shape} of {pixels.dtype}, not [..., 3, height, width] of torch.uint8",
            "CLIP has a mean and a standard deviation for red, green and blue alone.",
            "let the modality's cut_pixels return 8-bit RGB (PIL's convert('RGB')), or give the "
            "modality a transform of its own.",
        )


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Apply CLIP's mean and standard deviation, on the CPU.

    Args:
        pixels: [..., 3, height, width] uint8.

    Returns:
        The same shape in fp32.

    Raises:
        OneLLMError: as of `check_pixels`.
    """
    check_pixels(pixels)
    given = pixels.numpy()
    out = np.empty(given.shape, np.float32)
    for channel in range(3):  # mode: "raise" would write to a buffer first; bytes are in range
        values = out[..., channel, :, :]
        np.take(_NORMALISED[channel], given[..., channel, :, :], out=values, mode="clip")
    return torch.from_numpy(out)


def make_picture(value: torch.Tensor) -> Image.Image:
    """Make the picture again that was normalised: [3, height, width] -> RGB."""
    pixels = value.permute(1, 2, 0).numpy() * _STD[:, 0] + _MEAN[:, 0]
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def choose_crop_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Choose a random crop: 0.9 to 1 of the area, aspect ratio 3/4 to 4/3.

    The distribution is that of torchvision's RandomResizedCrop: ten attempts, then the largest
    centred crop whose aspect ratio is within the limits.
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
    """Cut out a box and resize it to [224, 224, 3] uint8, bicubic with antialiasing.

    This is torch's resize of bytes. It is three times as fast as Pillow's, which evaluation uses:
    no pixel differs from Pillow's by more than 2 of 255, and 1 in 100 differs at all (torch 2.15,
    Pillow 13). Both round and clip between the two directions, the horizontal one first. Pillow 13
    (its pull request 9549) swaps them where the height shrinks much more than the width, which
    shows at hard edges.
    """
    pixels = torch.from_numpy(_copy_box(picture, box)).permute(2, 0, 1)
    resized = functional.interpolate(
        pixels[None], size=(SIDE, SIDE), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


def _copy_box(picture: Image.Image, box: Box) -> np.ndarray:
    """[height, width, 3] uint8 of a box; a large picture is read in strips, to save memory."""
    left, top, right, bottom = box
    if picture.width * picture.height <= _STRIP:
        return np.asarray(picture)[top:bottom, left:right].copy()  # Pillow's array is read-only
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    rows = max(1, _STRIP // picture.width)
    for first in range(top, bottom, rows):
        last = min(first + rows, bottom)
        pixels[first - top : last - top] = np.asarray(picture.crop((left, first, right, last)))
    return pixels


def crop_eval(picture: Image.Image) -> Image.Image:
    """Resize the short side to 224 (bicubic) and cut out the middle, rounding as torchvision."""
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
