"""Fingerprints by which copies of media are found, whatever was done to them.

| media | fingerprint | finds copies that were |
|---|---|---|
| every part | SHA-256 | not changed |
| pictures, also of maps | dHashes and small grey pictures, | encoded again, resized, |
| | with 5% crops | cropped by up to 5% |
| video | the same of three of its frames | encoded again, resized |
| sound | the spectrum up to 4 kHz of ten seconds | encoded again, resampled |

Point clouds, IMU and fMRI have SHA-256 alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.modalities import Modality, Part, get_modality

SIDE = 80
"""Pixels of the grey picture that all else is made of."""
MARGIN = 4
"""Pixels of the grey picture (5%) that a crop leaves out."""
THUMBNAIL = 24
"""Pixels of the picture by which candidates are confirmed."""
FRAMES = 3
BANDS, STEPS = 48, 96
_LOW_BANDS = 96
"""Of 128 mel bands up to 8 kHz, those below 4 kHz."""
_SHIFTS = (0, 1, 2)
"""Where a crop begins: at the start, in the middle, at the end of what it leaves out."""


@dataclass(frozen=True)
class PictureFingerprint:
    """Hashes and small pictures of one picture: the whole one first, then its crops."""

    hashes: np.ndarray
    """[variants] uint64 dHashes."""
    thumbnails: np.ndarray
    """[variants, THUMBNAIL ** 2] fp32 of mean 0 and length 1; all 0 of a flat picture."""


@dataclass(frozen=True)
class MediaFingerprint:
    """Everything by which one sample is recognised."""

    sums: Mapping[str, str]
    """Role of a part -> SHA-256."""
    pictures: Sequence[PictureFingerprint] = ()
    """Fingerprints of its pictures; for a video, of its frames."""
    sounds: Sequence[np.ndarray] = field(default=())
    """[BANDS * STEPS] fp32 of mean 0 and length 1."""


def compute_fingerprint(
    names: Sequence[str], parts: Mapping[str, Part], meta: Mapping[str, Any]
) -> MediaFingerprint:
    """Compute the fingerprint of a sample.

    Args:
        names: the dataset's modalities.
        parts: extension -> part.
        meta: the sample's `.json`.

    Raises:
        SampleError: a medium cannot be read.
    """
    sums: dict[str, str] = {}
    pictures: list[PictureFingerprint] = []
    sounds: list[np.ndarray] = []
    for modality in map(get_modality, names):
        media = {role: parts[extension] for role, extension in modality.match(parts).items()}
        sums |= {role: hashlib.sha256(part.data).hexdigest() for role, part in media.items()}
        with decoding():
            if modality.visual:
                frames = _list_frames(modality, media, meta)
                pictures += [fingerprint_picture(frame) for frame in frames]
            elif modality.value_shape[1:2] == (128,):
                sounds.append(_fingerprint_sound(modality, media, meta))
    return MediaFingerprint(sums, pictures, sounds)


def _list_frames(
    modality: Modality, media: Mapping[str, Part], meta: Mapping[str, Any]
) -> list[Image.Image]:
    """The picture itself; of a pair its picture; some frames of a video."""
    raw = modality.read_raw(media, meta)
    if isinstance(raw, Image.Image):
        return [raw]
    if modality.frames <= 2:
        return [raw.picture]
    frames = raw.frames
    at = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    return [Image.fromarray(np.asarray(frames[i])) for i in dict.fromkeys(at.tolist())]


def fingerprint_picture(picture: Image.Image) -> PictureFingerprint:
    """Compute the fingerprint of a picture."""
    grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    boxes = [(0, 0, SIDE, SIDE)]
    for top in _SHIFTS:
        for left in _SHIFTS:
            x, y = left * MARGIN // 2, top * MARGIN // 2
            boxes.append((x, y, x + SIDE - MARGIN, y + SIDE - MARGIN))
    hashes, thumbnails = [], []
    for box in boxes:
        small = grey.resize((9, 8), Image.Resampling.BOX, box=box)
        cells = np.asarray(small, np.int16)
        bits = (cells[:, :-1] < cells[:, 1:]).reshape(64)
        hashes.append(int.from_bytes(np.packbits(bits).tobytes(), "big"))
        small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, box=box)
        thumbnails.append(_normalise(np.asarray(small, np.float32)))
    return PictureFingerprint(np.array(hashes, np.uint64), np.stack(thumbnails))


def _fingerprint_sound(
    modality: Modality, media: Mapping[str, Part], meta: Mapping[str, Any]
) -> np.ndarray:
    value = modality.read_value(media, meta, train=False, rng=np.random.default_rng(0))
    bands = value[0, :_LOW_BANDS].numpy()
    heard = bands[:, : max(STEPS, int((np.ptp(bands, axis=0) > 0).sum()))]
    rows = heard.reshape(BANDS, -1, heard.shape[1]).mean(1)
    rows -= rows.mean(1, keepdims=True)
    edges = np.linspace(0, rows.shape[1], STEPS + 1).astype(int)
    steps = np.stack([rows[:, a:b].mean(1) for a, b in pairwise(edges)], 1)
    return _normalise(steps)


def _normalise(values: np.ndarray) -> np.ndarray:
    flat: np.ndarray = values.reshape(-1).astype(np.float32)
    flat = flat - flat.mean()
    length = float(np.linalg.norm(flat))
    return flat / length if length > 1e-3 else np.zeros_like(flat)
