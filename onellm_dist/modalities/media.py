"""Frames and sound out of media containers, by PyAV (FFmpeg)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np

from onellm_dist.errors import SampleError
from onellm_dist.modalities.base import Part

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

_FORMATS = "mov,mp4,m4a,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,mp3,aac,ac3,wav,flac,aiff,caf,w64,amr,m4v,h264,hevc"
"""Containers FFmpeg may guess. Playlists (hls, concat, dash) are not among them: a sample must not open files or addresses."""


@contextmanager
def open_media(part: Part, kind: str) -> Iterator[InputContainer]:
    """The container in a part's bytes; what FFmpeg raises inside becomes a SampleError.

    Args:
        kind: "video" or "audio", the kind of stream that must be there.

    Raises:
        SampleError: the bytes are no such media.
    """
    try:
        with av.open(io.BytesIO(part.data), mode="r", options={"format_whitelist": _FORMATS}) as container:
            if not (container.streams.video if kind == "video" else container.streams.audio):
                raise SampleError(
                    f".{part.extension} has no {kind} stream",
                    f"the sample cannot be read as {kind}.",
                    "drop the sample, or give it the right modality.",
                )
            yield container
    except SampleError:
        raise
    except Exception as error:  # FFmpegError, and anything that PyAV makes of broken bytes
        raise SampleError(
            f".{part.extension} ({len(part.data)} bytes) is no readable {kind}: {error or type(error).__name__}",
            f"the sample has no usable {kind}.",
            "download or encode it again, or drop the sample.",
        ) from error


@dataclass(frozen=True)
class FrameTable:
    """Where the frames of a video are.

    Attributes:
        times: presentation times of all frames, ascending, in the stream's time base; or just 0, 1, 2 ... (`counted`).
        keys: those of the key frames, ascending.
        rate: mean frames per second.
        counted: packets carry no times of their own (XviD in AVI, raw streams): frames are told by their number.
    """

    times: tuple[int, ...]
    keys: tuple[int, ...]
    rate: float
    counted: bool = False


def frame_table(container: InputContainer) -> FrameTable:
    """The table of the first video stream; packets are only read for it, not decoded.

    Raises:
        ValueError: no frames, or no frame rate.
    """
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
    if len(known) != len(times):
        return FrameTable(tuple(range(len(times))), (0,), float(rate), counted=True)
    return FrameTable(tuple(known), tuple(sorted(keys)), float(rate))


def frames_at(container: InputContainer, table: FrameTable, times: list[int]) -> dict[int, np.ndarray]:
    """The frames of these times (ascending, out of `table.times`), [H, W, 3] uint8 RGB upright, decoding as little as possible.

    Raises:
        ValueError: a frame cannot be decoded.
    """
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # workers are the parallelism
    found: dict[int, np.ndarray] = {}
    decoder: Iterator[tuple[int, VideoFrame]] | None = None
    at = 0
    for time in times:
        key = max((k for k in table.keys if k <= time), default=table.times[0])
        if decoder is None or key > at:
            container.seek(0 if table.counted else key, stream=stream, backward=True)
            frames = container.decode(stream)
            decoder = enumerate(frames) if table.counted else ((f.pts, f) for f in frames if f.pts is not None)
        for at, frame in decoder:
            if at >= time:
                if at == time:
                    found[time] = _upright(frame)
                break
        if time not in found:
            raise ValueError(f"frame {table.times.index(time)} of {len(table.times)} cannot be decoded")
    return found


def _upright(frame: VideoFrame) -> np.ndarray:
    """RGB [H, W, 3], turned as the container's display matrix says (as decord does)."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def first_channel(part: Part, seconds: float) -> tuple[np.ndarray, int]:
    """Up to `seconds` of the first audio stream's first channel, [N] fp32, and its rate in Hz.

    Raises:
        SampleError: no readable audio.
    """
    with open_media(part, "audio") as container:
        stream = container.streams.audio[0]
        rate = int(stream.rate)
        wanted, have, blocks = int(seconds * rate), 0, []
        planar = av.AudioResampler(format="fltp")  # sample format only: rate and layout stay
        for frame in container.decode(stream):
            for plane in planar.resample(frame):
                block = plane.to_ndarray()[0]
                blocks.append(block)
                have += len(block)
            if have >= wanted:
                break
        if not blocks:
            raise ValueError("it has no sound in it")
    return np.concatenate(blocks)[:wanted].astype(np.float32, copy=False), rate
