"""Opening media containers, with PyAV (FFmpeg): the same for films and for sounds."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import av

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.io.file_kinds import describe_damage
from onellm_dist.modalities.library_faults import require_library

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_FORMATS = (
    "mov,mp4,m4a,matroska,webm,avi,flv,mpeg,mpegts,asf,ogg,mp3,aac,ac3,wav,flac,aiff,caf,w64,amr"
)
"""Containers that FFmpeg may detect.

Playlists (hls, concat, dash) are not among them: a sample must not open files or addresses."""


@contextmanager
def open_media(part: Part, kind: str) -> Iterator[InputContainer]:
    """Open the container in a part's bytes; what FFmpeg raises meanwhile becomes a SampleError.

    Args:
        part: the file.
        kind: "video" or "audio", the kind of stream that it must have.

    Raises:
        SampleError: the bytes are not such media.
        OneLLMError: the installed PyAV lacks what is used of it, which is not a fault of the bytes.
    """
    try:
        with av.open(
            io.BytesIO(part.data), mode="r", options={"format_whitelist": _FORMATS}
        ) as container:
            if not (find_films(container) if kind == "video" else container.streams.audio):
                still = kind == "video" and len(container.streams.video)
                raise SampleError(
                    f".{part.extension} has no {kind} stream" + ", only a still" * bool(still),
                    f"the sample cannot be read as {kind}.",
                    "drop the sample, or declare its real modality.",
                )
            yield container
    except OneLLMError:
        raise
    except Exception as error:  # FFmpegError, and anything that PyAV raises for broken bytes
        require_library(error)
        raise SampleError(
            f".{part.extension} ({len(part.data)} bytes) is not readable {kind}: "
            f"{_describe(error, part.data)}",
            f"the sample has no usable {kind}.",
            "download or encode it again, or drop the sample.",
        ) from error


def _describe(error: Exception, data: bytes) -> str:
    if not isinstance(error, av.FFmpegError):
        return str(error) or type(error).__name__
    known = describe_damage(data, "audio file")
    if known is not None:
        return known
    if data[4:8] == b"ftyp" and b"moov" not in data:
        return "its table of contents (moov) is missing: it was not written or copied to its end"
    if isinstance(error, av.InvalidDataError):
        return "its header, or what follows it, is damaged or of another format"
    if error.errno == errno.EINVAL:  # av.ArgumentError, which PyAV has from 17.0 on
        return f"it is in none of the containers that are read ({_FORMATS.replace(',', ', ')})"
    return error.strerror or type(error).__name__


def find_films(container: InputContainer) -> list[VideoStream]:
    """Find the streams of a container that are films: no covers, no thumbnails, no stills."""
    kinds = av.stream.Disposition
    stills = kinds.attached_pic | kinds.timed_thumbnails | kinds.still_image
    return [
        stream
        for stream in container.streams.video
        if not stream.disposition & stills and stream.codec_context is not None
    ]


def measure_duration(part: Part) -> float | None:
    """Measure a sound or a film in seconds, as its container states; None if it states nothing."""
    try:
        with av.open(
            io.BytesIO(part.data), mode="r", options={"format_whitelist": _FORMATS}
        ) as container:
            return container.duration / av.time_base if container.duration else None
    except av.FFmpegError:
        return None
