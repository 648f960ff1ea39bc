"""Pictures on their way into shards: encoded again smaller, and a perceptual hash for finding near copies."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps

from onellm_dist.modalities import get_modality
from onellm_dist.shards.sources.base import BadSampleError

DEFAULT_QUALITY = 95
STORED = "jpg"
"""Extension of pictures that were encoded again."""


def get_picture_extensions(modalities: Sequence[str]) -> frozenset[str]:
    """Parts that are a whole sample's picture: of modalities with one slot, which takes JPEG.

    A picture that a second part (a depth map) is aligned to is none, since both would have to change.
    """
    found: set[str] = set()
    for name in modalities:
        modality = get_modality(name)
        accepted = next(iter(modality.required_parts.values()))
        if len(modality.required_parts) == 1 and not modality.optional_parts and STORED in accepted:
            found.update(accepted)
    return frozenset(found)


def _opened(data: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except (
        Exception
    ) as error:  # Pillow's decoders raise many kinds; each means that this picture cannot be read
        raise BadSampleError(f"unreadable picture: {type(error).__name__}: {error}") from error
    return picture


def reencode_pictures(
    parts: Mapping[str, bytes], pictures: frozenset[str], resize: int | None, quality: int | None
) -> dict[str, bytes]:
    """The parts with their pictures as JPEG, the shorter side at most `resize`; a picture that is small enough stays as it is
    unless `quality` is given. EXIF's rotation is applied; other metadata is dropped.

    Raises:
        BadSampleError: a picture cannot be read.
    """
    result: dict[str, bytes] = {}
    for extension, data in parts.items():
        if extension not in pictures:
            result[extension] = data
            continue
        picture = _opened(data)
        smaller = resize is not None and min(picture.size) > resize
        if not smaller and quality is None:
            result[extension] = data
            continue
        try:
            result[STORED] = _as_jpeg(
                picture, resize if smaller else None, quality or DEFAULT_QUALITY
            )
        except Exception as error:  # a broken EXIF, a mode or a size that JPEG has not
            raise BadSampleError(f"unreadable picture: {type(error).__name__}: {error}") from error
    return result


def _as_jpeg(picture: Image.Image, resize: int | None, quality: int) -> bytes:
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    if resize is not None:
        shorter = min(upright.size)
        width, height = (max(1, round(side * resize / shorter)) for side in upright.size)
        upright = upright.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    upright.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def compute_dhash(data: bytes) -> int:
    """64 bits: is each of 8 x 8 grey cells darker than its right neighbour (Krawetz 2013, "Kind of Like That").

    Raises:
        BadSampleError: the picture cannot be read.
    """
    grey = np.asarray(
        _opened(data).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16
    )
    bits = (grey[:, :-1] < grey[:, 1:]).reshape(64)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
