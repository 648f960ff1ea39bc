"""How large media may be, by modality: one table for building, training and serving.

Numbers of a header are checked before anything is decoded or allocated from them, and the model's
input is checked after the transform. A limit is far above what people record: it keeps one file
from taking a worker's memory, or one wrong number from becoming a loss of NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from onellm_dist.common.errors import SampleError

_DROP = "drop the sample, or store it within the limit."


@dataclass(frozen=True)
class Limits:
    """The limits of one modality; the default of each is no limit."""

    pixels: float = math.inf
    """Width times height of a picture, or of one frame of a film."""
    aspect: float = math.inf
    """Ratio of the long to the short side."""
    rate: tuple[float, float] = (0.0, math.inf)
    """Lowest and highest number of frames or samples per second, in Hz."""
    duration: float = math.inf
    """Length of a recording in seconds."""
    channels: float = math.inf
    """Channels of a recording, colour bands of a picture."""
    points: float = math.inf
    """Points of a cloud."""
    values: float = math.inf
    """Numbers in one array."""
    magnitude: float = math.inf
    """Largest absolute value of the model's input; NaN and infinities are always refused."""


_STILL = Limits(pixels=110_000_000, aspect=10_000, channels=5, values=600_000_000, magnitude=3)
"""Pixels: a telephone's 108 megapixels; decoded, cropped and composited they take 0.9 GB.

Magnitude: CLIP's normalisation maps a byte to at most 2.2."""
LIMITS: Mapping[str, Limits] = {
    "image": _STILL,
    # 8K (8192 x 4320); three crops of a longer frame show next to nothing of it.
    "video": Limits(
        pixels=36_000_000, aspect=20, rate=(1e-3, 1000), duration=7 * 86_400, magnitude=3
    ),
    # From telephone loggers to ultrasound; AudioSet's log-mel energies stay within -1.3 and 2.
    "audio": Limits(rate=(100, 1_000_000), duration=7 * 86_400, channels=256, magnitude=10),
    # Coordinates in the unit sphere, colours of 0 to 1.
    "point": Limits(points=50_000_000, values=1_000_000_000, magnitude=10),
    "depth": _STILL,
    "normal": _STILL,
    # m/s^2 and rad/s: 1000 g and 57,000 degrees a second.
    "imu": Limits(
        rate=(1, 100_000), duration=7 * 86_400, channels=6, values=500_000_000, magnitude=10_000
    ),
    # z-scores, or percent signal change; NSD stores the latter times 300 as 16-bit integers.
    "fmri": Limits(values=200_000_000, magnitude=1000),
}
"""Name of a modality to its limits. A modality of another package states its own (`limits`)."""


def check_size(limits: Limits, width: int, height: int, name: str) -> None:
    """Check the size of a picture or a frame.

    Args:
        limits: the modality's limits.
        width: pixels.
        height: pixels.
        name: what the error calls the medium, such as ".jpg".

    Raises:
        SampleError: a side is 0, or pixels or aspect ratio exceed the limit.
    """
    size = f"{name} is {width:,} x {height:,} pixels"
    if min(width, height) < 1:
        raise SampleError(size, "there is nothing to see in it.", "drop the sample.")
    if width * height > limits.pixels:
        raise SampleError(
            f"{size}; the limit is {limits.pixels:,.0f} pixels",
            "decoding it could take a worker's whole memory.",
            _DROP,
        )
    if max(width, height) > limits.aspect * min(width, height):
        raise SampleError(
            f"{size}; the limit is an aspect ratio of {limits.aspect:g} : 1",
            "the model sees squares of 224 pixels, which show next to nothing of it.",
            _DROP,
        )


def check_rate(limits: Limits, rate: float, name: str) -> None:
    """Check a number of frames or samples per second.

    Args:
        limits: the modality's limits.
        rate: Hz.
        name: what the error calls the medium.

    Raises:
        SampleError: the rate is not a number, or lies outside the limits.
    """
    low, high = limits.rate
    if not low <= rate <= high:  # false for NaN, too
        raise SampleError(
            f"{name} states a rate of {rate:g} Hz; the limits are {low:g} to {high:g} Hz",
            "the file's header is damaged, or its times are in another unit.",
            "repair or drop the sample.",
        )


def check_duration(limits: Limits, seconds: float, name: str) -> None:
    """Check the length of a recording.

    Args:
        limits: the modality's limits.
        seconds: the length.
        name: what the error calls the medium.

    Raises:
        SampleError: the length is not a number, is negative, or exceeds the limit.
    """
    if not 0 <= seconds <= limits.duration:
        raise SampleError(
            f"{name} lasts {seconds:g} s; the limit is {limits.duration:,} s",
            "the file's header is damaged, or its times are in another unit.",
            "repair or drop the sample, or cut it.",
        )


def check_count(limits: Limits, what: str, count: int, name: str) -> None:
    """Check a number of channels, points or values.

    Args:
        limits: the modality's limits.
        what: the field of `Limits`: channels, points or values.
        count: how many the header states.
        name: what the error calls the medium.

    Raises:
        SampleError: there are none, or more than the limit.
    """
    limit: float = getattr(limits, what)
    if not 1 <= count <= limit:
        raise SampleError(
            f"{name} has {count:,} {what}; the limits are 1 to {limit:,}",
            "reading it could take a worker's whole memory, or there is nothing in it.",
            _DROP,
        )


def check_input(limits: Limits, value: torch.Tensor, name: str) -> None:
    """Check the model's input: finite, and of a plausible size.

    Args:
        limits: the modality's limits.
        value: what the modality's `transform` returned, fp32 of any shape.
        name: what the error calls the medium.

    Raises:
        SampleError: a value is NaN or infinite, or its absolute value exceeds `limits.magnitude`.
    """
    if value.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(value))  # NaN if one value is NaN
    largest = max(-low, high) if math.isfinite(low) and math.isfinite(high) else math.nan
    if not largest <= limits.magnitude or math.isnan(largest):
        found = "NaN or infinite values" if math.isnan(largest) else f"a value of {largest:g}"
        raise SampleError(
            f"{name} would give the model {found}; the limit is {limits.magnitude:g}",
            "one such input makes the gradients of the whole step useless.",
            "check the units and the file, or drop the sample.",
        )
