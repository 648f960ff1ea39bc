"""Pictures on their way into shards: re-encode them smaller, and hash them to find near copies."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.io.pictures import decode_picture
from onellm_dist.shards.format.media import split_prefix
from onellm_dist.shards.sources.base import BadSampleError

DEFAULT_QUALITY = 95
STORED = "jpg"
"""Extension of re-encoded pictures."""


def get_picture_extensions(modalities: Sequence[str]) -> frozenset[str]:
    """Return the extensions of parts that are the one picture of a sample.

    They belong to modalities with a single part that accepts JPEG. A picture that a second part (a
    depth map) is aligned to is excluded, because both would have to change together.
    """
    found: set[str] = set()
    for name in modalities:
        modality = get_modality(name)
        accepted = next(iter(modality.required_parts.values()))
        if len(modality.required_parts) == 1 and not modality.optional_parts and STORED in accepted:
            found.update(accepted)
    return frozenset(found)


def _read_picture(extension: str, data: bytes) -> Image.Image:
    """Read a picture as training does: upright RGB.

    Raises:
        BadSampleError: it cannot be read.
    """
    try:
        return decode_picture(Part(extension, data))
    except SampleError as error:
        raise BadSampleError(f"unreadable picture: {error.what}") from error


def reencode_pictures(
    parts: Mapping[str, bytes], pictures: frozenset[str], resize: int | None, quality: int | None
) -> dict[str, bytes]:
    """Return the parts with their pictures re-encoded as JPEG.

    The pixels are those that training would read (`io.pictures.decode_picture`); metadata is
    dropped.

    Args:
        parts: extension to content.
        pictures: the extensions of pictures.
        resize: the shorter side has at most this many pixels. A picture that is small enough stays
            as it is unless `quality` is given.
        quality: JPEG quality; None: DEFAULT_QUALITY, and only where `resize` changes the picture.

    Raises:
        BadSampleError: a picture cannot be read.
    """
    result: dict[str, bytes] = {}
    for extension, data in parts.items():
        if extension not in pictures:
            result[extension] = data
            continue
        picture = _read_picture(extension, data)
        too_large = resize is not None and min(picture.size) > resize
        if not too_large and quality is None:
            result[extension] = data
            continue
        size = resize if too_large else None
        try:
            prefix = split_prefix(extension)[0]
            stored = f"{prefix}.{STORED}" if prefix else STORED
            result[stored] = _encode_jpeg(picture, size, quality or DEFAULT_QUALITY)
        except MemoryError:
            raise
        except Exception as error:  # a size that JPEG does not have
            raise BadSampleError(f"unreadable picture: {type(error).__name__}: {error}") from error
    return result


def _encode_jpeg(picture: Image.Image, resize: int | None, quality: int) -> bytes:
    if resize is not None:
        shorter = min(picture.size)
        width, height = (max(1, round(side * resize / shorter)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def compute_dhash(data: bytes, extension: str = STORED) -> int:
    """Compute the dHash of a picture (Krawetz 2013, "Kind of Like That").

    Its 64 bits say which of 8 x 8 grey cells are darker than their right neighbours. They are the
    cells of the picture as training reads it: upright, transparency on white.

    Args:
        data: the file.
        extension: what an error calls it.

    Raises:
        BadSampleError: the picture cannot be read.
    """
    small = _read_picture(extension, data).convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.int16)
    bits = (grey[:, :-1] < grey[:, 1:]).reshape(64)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
