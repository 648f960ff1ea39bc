"""The sound of a video as a file of its own."""

from __future__ import annotations

import io
from dataclasses import dataclass

import av

from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.shards.sources.base import BadSampleError, Media


@dataclass(frozen=True)
class SoundTrack:
    """The first sound track of a video, as Matroska; it is copied, not encoded again."""

    video: Media

    def read_bytes(self) -> bytes:
        """Copy the packets of the track.

        Raises:
            BadSampleError: the video has no sound, or cannot be read.
        """
        data = self.video.read_bytes()
        with decoding():
            return _copy_track(data)


def _copy_track(data: bytes) -> bytes:
    out = io.BytesIO()
    try:
        with av.open(io.BytesIO(data), "r") as source:
            if not source.streams.audio:
                raise BadSampleError("no sound: the video has no sound track")
            stream = source.streams.audio[0]
            with av.open(out, "w", format="matroska") as target:
                copy = target.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.stream = copy
                        target.mux(packet)
    except av.FFmpegError as error:
        raise BadSampleError(f"unreadable video: {error.strerror}") from error
    return out.getvalue()
