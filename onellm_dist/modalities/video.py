"""Videos: 5 frames x 3 crops, each an encoder sequence; their outputs are averaged (paper 3.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from onellm_dist.common.errors import SampleError
from onellm_dist.common.media_size import MediaSize
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.drawing import join_pictures, make_thumbnail
from onellm_dist.modalities.io.frames import measure_film, read_frames
from onellm_dist.modalities.io.pictures import make_rgb_picture
from onellm_dist.modalities.limits import LIMITS
from onellm_dist.modalities.transforms.crops import (
    CLIP_MEAN,
    CLIP_STD,
    PATCHES,
    SIDE,
    make_picture,
)

CLIPS = 5
CROPS = 3
CLIP_SECONDS = 1.0
STRETCH_SECONDS = 10.0
"""Length of film for which a span is worth while, where `data.spans` allows several."""


@dataclass(frozen=True)
class VideoClip:
    """The frames of a video that the model sees.

    Attributes:
        frames: 5 arrays [H, W, 3] uint8 RGB of one size. A short video repeats a frame; the same
            array then stands in several places.
        seconds: when each frame is shown, from its number and the mean frame rate.
    """

    frames: tuple[np.ndarray, ...]
    seconds: tuple[float, ...]


class VideoModality(Modality):
    """Videos, sampled as in the reference (pytorchvideo 0.1.5 and decord).

    | | |
    |---|---|
    | files | `video`: mp4, webm, mkv, avi, mov, m4v; any codec that FFmpeg decodes |
    | raw signal | `VideoClip`: the first frames of 5 one-second clips, spread evenly |
    | model input | [15, 3, 224, 224]: frame by frame, three crops each, CLIP's normalisation |
    | encoder tokens | 15 sequences of 256 patches and the class token |
    | spans | one; of several, 5 clips each, all of them spread evenly over the film |

    Sound is not read. Training does not augment, as in the reference. Covers and thumbnails are no
    film; of several films in a file the default one is read, else the longest. Rotation and
    mirroring are followed. The frame rate is the stated one unless the presentation times differ
    by more than a tenth. A film that is cut short, or of which a frame cannot be decoded, is used
    and noted as damaged unless more than a quarter is missing.
    """

    name = "video"
    order = 1
    limits = LIMITS["video"]
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "video": ("mp4", "webm", "mkv", "avi", "mov", "m4v")
    }
    value_shape = (CLIPS * CROPS, 3, SIDE, SIDE)
    frames = CLIPS * CROPS
    tokens = PATCHES
    visual = True

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> VideoClip:
        """Read the first frame of each of 5 one-second clips that are spread over the video.

        Raises:
            SampleError: as of `io.frames.read_frames`, or the frames have several sizes.
        """
        return self._read(parts["video"], CLIPS)

    def measure(self, parts: Mapping[str, Part]) -> MediaSize:
        """Read size, number of frames and length from the container, without decoding frames."""
        return measure_film(parts["video"])

    def count_spans(self, size: MediaSize, most: int) -> int:
        """One span for each 10 seconds of the film."""
        return max(1, min(most, math.ceil(size.seconds / STRETCH_SECONDS)))

    def decode_spans(
        self, parts: Mapping[str, Part], meta: Mapping[str, Any], spans: int
    ) -> list[VideoClip]:
        """Read 5 clips for each span, all of them spread evenly over the film."""
        film = self._read(parts["video"], spans * CLIPS)
        return [
            VideoClip(film.frames[i : i + CLIPS], film.seconds[i : i + CLIPS])
            for i in range(0, spans * CLIPS, CLIPS)
        ]

    def _read(self, part: Part, clips: int) -> VideoClip:
        frames, seconds = read_frames(part, partial(compute_clip_starts, clips=clips))
        if any(f.shape != frames[0].shape for f in frames):
            raise SampleError(
                f".{part.extension}: frames of {sorted({f.shape[1::-1] for f in frames})} pixels",
                "frames must have one size.",
                "encode the video again at one size, or drop the sample.",
            )
        return VideoClip(tuple(frames), tuple(seconds))

    def make_raw(self, item: Any) -> Any:
        """Take a list of pictures, or an array of them, as a film.

        Five frames are taken from the first to the last, evenly: without times it is not known how
        long the film is. All frames must have one size.
        """
        is_array = isinstance(item, np.ndarray) and item.ndim == 4 and len(item)
        if not is_array and not (isinstance(item, list | tuple) and self.is_one_medium(item)):
            return item
        places = np.linspace(0, len(item) - 1, CLIPS).round().astype(int).tolist()
        held = {i: np.array(make_rgb_picture(_to_picture(item[i]), self.limits)) for i in places}
        if len({frame.shape for frame in held.values()}) > 1:
            raise SampleError(
                f"frames of {sorted({f.shape[1::-1] for f in held.values()})} pixels",
                "frames must have one size.",
                "resize them.",
            )
        return VideoClip(tuple(held[i] for i in places), tuple(map(float, places)))

    def is_one_medium(self, items: Sequence[Any]) -> bool:
        """Pictures are the frames of one film."""
        first = items[0] if items else None
        return isinstance(first, Image.Image) or (
            isinstance(first, np.ndarray | torch.Tensor) and first.ndim == 3
        )

    def transform(self, raw: VideoClip, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[15, 3, 224, 224]: the frames in order, each as three crops along its long side."""
        mean = torch.tensor(CLIP_MEAN)[:, None, None]
        deviation = torch.tensor(CLIP_STD)[:, None, None]
        out = torch.empty(self.value_shape)
        done: dict[int, torch.Tensor] = {}
        for i, frame in enumerate(raw.frames):
            crops = done.get(id(frame))
            if crops is None:
                scaled = scale_short_side(frame).sub_(mean).div_(deviation)
                crops = done[id(frame)] = torch.stack(cut_three_crops(scaled))
            out[i * CROPS : (i + 1) * CROPS] = crops
        return out

    def build_tokenizer(self, width: int) -> None:
        """Return None: the encoder reads pixels itself."""
        return

    def preview(self, raw: VideoClip) -> Image.Image:
        """The five frames as a strip, 446 pixels wide if they are wider than high."""
        return join_pictures([make_thumbnail(Image.fromarray(f), 86) for f in raw.frames])

    def draw_value(self, value: torch.Tensor) -> Image.Image:
        """The five frames side by side, the three crops of each one above the other."""
        crops = [make_thumbnail(make_picture(crop), 86) for crop in value]
        columns = [crops[i : i + CROPS] for i in range(0, len(crops), CROPS)]
        return join_pictures([join_pictures(column, down=True) for column in columns])


def _to_picture(frame: Any) -> Any:
    """A frame as a picture that is not a tensor."""
    return frame.numpy() if isinstance(frame, torch.Tensor) else frame


def compute_clip_starts(total: int, rate: float, clips: int = CLIPS) -> list[int]:
    """Compute the first frames of one-second clips that are spread evenly over a video.

    This follows pytorchvideo's ConstantClipsPerVideoSampler and its decord reader: starts are in
    seconds, rounded up to a frame. A video shorter than a second gives frame 0 every time.

    Args:
        total: frames of the video.
        rate: frames per second.
        clips: how many, at least 2.

    Returns:
        Indices of as many frames.
    """
    last = max(float(total) / rate - CLIP_SECONDS, 0.0)
    return [min(math.ceil(rate * (i * (last / (clips - 1)))), total - 1) for i in range(clips)]


def scale_short_side(frame: np.ndarray) -> torch.Tensor:
    """Resize the short side to 224, bilinear without antialiasing; the long side is rounded down.

    Args:
        frame: [H, W, 3] uint8.

    Returns:
        [3, h, w] fp32 in [0, 1].
    """
    height, width = frame.shape[:2]
    if width < height:
        size = (math.floor(height / width * SIDE), SIDE)
    else:
        size = (SIDE, math.floor(width / height * SIDE))
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float().div_(255)
    return functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0]


def cut_three_crops(picture: torch.Tensor) -> list[torch.Tensor]:
    """Cut [3, h, w] into its left, middle and right; an upright one into top, middle and bottom.

    Returns:
        Three tensors [3, 224, 224].
    """
    height, width = picture.shape[1:]
    spare = max(height, width) - SIDE
    starts = (0, math.ceil(spare / 2), spare)
    if height > width:
        return [picture[:, s : s + SIDE, :] for s in starts]
    return [picture[:, :, s : s + SIDE] for s in starts]


MODALITY = VideoModality()
