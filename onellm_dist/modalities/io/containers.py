"""Frames from media containers, with PyAV (FFmpeg)."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Part

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_FORMATS = (
    "mov,mp4,m4a,matroska,webm,avi,flv,mpeg,mpegts,asf,ogg,mp3,aac,ac3,wav,flac,aiff,caf,w64,amr"
)
"""Containers that FFmpeg may detect.

Playlists (hls, concat, dash) are not among them: a sample must not open files or addresses."""

_SEEKABLE = {"mov", "mp4", "matroska", "webm", "flv"}
"""Those that store presentation times and seek by them. AVI reports wrong times of B-frames."""


@contextmanager
def open_media(part: Part, kind: str) -> Iterator[InputContainer]:
    """Open the container in a part's bytes; what FFmpeg raises meanwhile becomes a SampleError.

    Args:
        part: the file.
        kind: "video" or "audio", the kind of stream that it must have.

    Raises:
        SampleError: the bytes are not such media.
    """
    try:
        with av.open(
            io.BytesIO(part.data), mode="r", options={"format_whitelist": _FORMATS}
        ) as container:
            if not (container.streams.video if kind == "video" else container.streams.audio):
                raise SampleError(
                    f".{part.extension} has no {kind} stream",
                    f"the sample cannot be read as {kind}.",
                    "drop the sample, or declare its real modality.",
                )
            yield container
    except SampleError:
        raise
    except Exception as error:  # FFmpegError, and anything that PyAV raises for broken bytes
        raise SampleError(
            f".{part.extension} ({len(part.data)} bytes) is not readable {kind}: "
            f"{error or type(error).__name__}",
            f"the sample has no usable {kind}.",
            "download or encode it again, or drop the sample.",
        ) from error


@dataclass(frozen=True)
class FrameTable:
    """Where the frames of a video are.

    Attributes:
        times: presentation times of all frames, ascending, in the stream's time base; 0, 1, 2, ...
            if `counted`.
        keys: presentation times of the key frames, ascending.
        rate: mean frames per second.
        counted: the container has no reliable times to seek by; a frame is found by its number,
            decoding all frames before it.
    """

    times: tuple[int, ...]
    keys: tuple[int, ...]
    rate: float
    counted: bool


def read_frames(
    part: Part, choose: Callable[[int, float], Sequence[int]]
) -> tuple[list[np.ndarray], list[float]]:
    """Read some frames of a video.

    Args:
        part: the file.
        choose: number of frames and frames per second -> indices of the wanted frames; a repeated
            index gives the same array again.

    Returns:
        Frames [H, W, 3] uint8 RGB, upright; and the second at which each is shown (its number over
        the mean rate).

    Raises:
        SampleError: the video cannot be read, or one of the frames cannot be decoded.
    """
    with open_media(part, "video") as container:
        table = _read_frame_table(container)
        indices = choose(len(table.times), table.rate)
        wanted = sorted({table.times[i] for i in indices})
        if not table.counted:
            found = _decode_by_seeking(container, table, wanted)
    if table.counted:
        with open_media(part, "video") as container:  # again: some of these cannot seek
            found = _decode_by_number(container, wanted)
    missing = [t for t in wanted if t not in found]
    if missing:
        raise SampleError(
            f".{part.extension}: frame {table.times.index(missing[0])} of {len(table.times)} "
            f"cannot be decoded",
            "the model needs it; another one in its place would be a guess.",
            "download or encode the video again, or drop the sample.",
        )
    return [found[table.times[i]] for i in indices], [i / table.rate for i in indices]


def _read_frame_table(container: InputContainer) -> FrameTable:
    """The table of the first video stream. Packets are read for it, not decoded."""
    stream = container.streams.video[0]
    times: list[int | None] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            times.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
    rate = stream.average_rate or stream.guessed_rate
    if not times or not rate:
        raise ValueError(f"{len(times)} frames at {rate} frames a second")
    known = sorted({t for t in times if t is not None})
    if not _SEEKABLE & set(container.format.name.split(",")) or len(known) != len(times):
        return FrameTable(tuple(range(len(times))), (), float(rate), counted=True)
    return FrameTable(tuple(known), tuple(sorted(keys)), float(rate), counted=False)


def _decode_by_seeking(
    container: InputContainer, table: FrameTable, wanted: Sequence[int]
) -> dict[int, np.ndarray]:
    """The frames at these ascending times; each is decoded from the last key frame before it."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # workers are the parallelism
    groups: dict[int, set[int]] = {}
    for time in wanted:
        at = bisect_right(table.keys, time)
        groups.setdefault(table.keys[at - 1] if at else table.times[0], set()).add(time)
    found: dict[int, np.ndarray] = {}
    for key, times in groups.items():
        container.seek(key, stream=stream, backward=True)
        for frame in _decode_needed(container, stream, times):
            if frame.pts in times and not frame.is_corrupt:
                found[frame.pts] = _to_upright_rgb(frame)
                if times <= found.keys():
                    break
    return found


def _decode_needed(
    container: InputContainer, stream: VideoStream, times: set[int]
) -> Iterator[VideoFrame]:
    """Decode frames from here on, without those that nobody needs.

    B-frames between the wanted ones are half of a usual H.264 video. No other frame is predicted
    from them, so that leaving them out changes no other frame.
    """
    for packet in container.demux(stream):
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
        yield from packet.decode()


def _decode_by_number(container: InputContainer, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    """The frames with these ascending numbers; all frames before them are decoded."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    found: dict[int, np.ndarray] = {}
    for number, frame in enumerate(container.decode(stream)):
        if number in wanted and not frame.is_corrupt:
            found[number] = _to_upright_rgb(frame)
        if number >= wanted[-1]:
            break
    return found


def _to_upright_rgb(frame: VideoFrame) -> np.ndarray:
    """[H, W, 3] RGB, rotated by the container's display matrix (as decord does)."""
    return np.ascontiguousarray(
        np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    )
