"""Videos: 5 frames x 3 crops, each an encoder sequence of its own; their outputs are averaged (paper 3.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.io.containers import read_frames
from onellm_dist.modalities.io.pictures import CLIP_MEAN, CLIP_STD, PATCHES, SIDE, beside, thumbnail

CLIPS, CROPS = 5, 3
CLIP_SECONDS = 1.0
_WIDEST = 20
"""Long over short side of a frame beyond which three crops of 224 show next to nothing of it."""


@dataclass(frozen=True)
class Clip:
    """The frames that the model sees of a video.

    Attributes:
        frames: 5 arrays [H, W, 3] uint8 RGB of one size (the same array where a short video repeats a frame).
        seconds: when they are shown, by their number and the mean frame rate.
    """

    frames: tuple[np.ndarray, ...]
    seconds: tuple[float, ...]


class VideoModality(Modality):
    """Videos in any container FFmpeg reads, with the reference's sampling (pytorchvideo 0.1.5 and decord).

    The raw signal is a `Clip`. Training has no augmentation, as in the reference.
    """

    name = "video"
    order = 1
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "video": ("mp4", "webm", "mkv", "avi", "mov", "m4v")
    }
    value_shape = (CLIPS * CROPS, 3, SIDE, SIDE)
    frames = CLIPS * CROPS
    tokens = PATCHES
    visual = True

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Clip:
        """The first frame of each of 5 one-second clips that are spread evenly over the video."""
        part = parts["video"]
        frames, seconds = read_frames(part, clip_starts)
        height, width = frames[0].shape[:2]
        if any(f.shape != frames[0].shape for f in frames) or max(height, width) > _WIDEST * min(
            height, width
        ):
            raise SampleError(
                f".{part.extension}: frames of {sorted({f.shape[1::-1] for f in frames})} pixels",
                f"frames must have one size, and a shape of at most {_WIDEST} : 1.",
                "encode the video again at one size, or drop the sample.",
            )
        return Clip(tuple(frames), tuple(seconds))

    def transform(self, raw: Clip, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[15, 3, 224, 224]: the frames in order, each as three crops along its long side."""
        mean, deviation = (
            torch.tensor(CLIP_MEAN)[:, None, None],
            torch.tensor(CLIP_STD)[:, None, None],
        )
        out = torch.empty(self.value_shape)
        done: dict[int, torch.Tensor] = {}
        for i, frame in enumerate(raw.frames):
            crops = done.get(id(frame))
            if crops is None:
                crops = done[id(frame)] = torch.stack(
                    three_crops(scale_short_side(frame).sub_(mean).div_(deviation))
                )
            out[i * CROPS : (i + 1) * CROPS] = crops
        return out

    def tokenizer(self, width: int) -> None:
        """None: the encoder reads pixels itself."""
        return

    def preview(self, raw: Clip) -> Image.Image:
        """The five frames as a strip, 446 pixels wide where frames are wide."""
        return beside([thumbnail(Image.fromarray(f), 86) for f in raw.frames])


def clip_starts(total: int, rate: float) -> list[int]:
    """Indices of the first frames of 5 clips of a second, spread evenly over `total` frames at `rate` a second.

    As pytorchvideo's ConstantClipsPerVideoSampler and its decord reader: starts in seconds, rounded up to a frame. A video
    shorter than a second gives frame 0 five times.
    """
    last = max(float(total) / rate - CLIP_SECONDS, 0.0)
    return [min(math.ceil(rate * (i * (last / (CLIPS - 1)))), total - 1) for i in range(CLIPS)]


def scale_short_side(frame: np.ndarray) -> torch.Tensor:
    """[H, W, 3] uint8 -> [3, h, w] fp32 in [0, 1], the short side 224: bilinear without antialiasing, long side floored."""
    height, width = frame.shape[:2]
    size = (
        (math.floor(height / width * SIDE), SIDE)
        if width < height
        else (SIDE, math.floor(width / height * SIDE))
    )
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float().div_(255)
    return torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[
        0
    ]


def three_crops(picture: torch.Tensor) -> list[torch.Tensor]:
    """[3, h, w] -> left, middle, right (top, middle, bottom where it is upright), each [3, 224, 224]."""
    height, width = picture.shape[1:]
    spare = max(height, width) - SIDE
    starts = (0, math.ceil(spare / 2), spare)
    if height > width:
        return [picture[:, s : s + SIDE, :] for s in starts]
    return [picture[:, :, s : s + SIDE] for s in starts]


MODALITY = VideoModality()
