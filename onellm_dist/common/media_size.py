"""What decides how many spans a medium takes: its size, as its header states it."""

from __future__ import annotations

from typing import NamedTuple

MOST_SPANS = 128
"""The most spans of a medium: 22 minutes of sound, or 4096 positions."""


class MediaSize(NamedTuple):
    """The size of one medium; 0 where its kind has no such size, or its header does not say."""

    width: int = 0
    """Pixels of a picture or of a frame, upright."""
    height: int = 0
    frames: int = 0
    """Frames of a film."""
    seconds: float = 0.0
    """Length of a sound or a film."""


class SampleMedium(NamedTuple):
    """One medium of a sample."""

    modality: str
    prefix: str = ""
    """What stands before the extensions of its parts: `0` for `0.jpg`; empty for `jpg`."""
    size: MediaSize = MediaSize()
