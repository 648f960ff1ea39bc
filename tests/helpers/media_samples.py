"""Small real media files in memory."""

from __future__ import annotations

import io
from collections.abc import Callable

import av
import numpy as np
import pytest
import soundfile
from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from PIL import Image

from onellm_dist.modalities import Part


def npy(array: np.ndarray, extension: str = "npy") -> Part:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return Part(extension, buffer.getvalue())


def photo(width: int = 320, height: int = 240, seed: int = 0) -> Image.Image:
    """A smooth coloured picture with some noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack(
        [columns * 255 / width, rows * 255 / height, (rows + columns) % 256], -1
    ) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def picture(
    image: Image.Image, form: str = "PNG", extension: str | None = None, **options: object
) -> Part:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Part(extension or form.lower(), buffer.getvalue())


def bar(number: int, total: int, width: int, height: int) -> np.ndarray:
    """Frame `number` of a video: a white bar that grows, under a stripe that gets lighter."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : round((number + 1) / total * width)] = 255
    frame[: height // 4] = number * 255 // total
    return frame


def video(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    frames: int = 60,
    fps: int = 20,
    size: tuple[int, int] = (160, 96),
    rotation: int | None = None,
    draw: Callable[[int, int, int, int], np.ndarray] = bar,
    options: dict[str, str] | None = None,
) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if rotation is not None:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip(f"PyAV {av.__version__} cannot write a display matrix")
            stream.set_display_rotation(rotation)
        for i in range(frames):
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(draw(i, frames, *size), format="rgb24")
            ):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return buffer.getvalue()


def every_frame(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data), "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def tone(rate: int = 16000, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(
        np.float32
    )


def sound(
    wave: np.ndarray,
    rate: int,
    form: str = "WAV",
    subtype: str | None = None,
    extension: str | None = None,
) -> Part:
    """`wave` [N] or [N, channels] by libsndfile."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype)
    return Part(extension or form.lower(), buffer.getvalue())


def sound_by_ffmpeg(wave: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    """[N] mono by FFmpeg, in frames of 1000 samples."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        assert isinstance(stream, AudioStream)
        for start in range(0, len(wave), 1000):
            frame = av.AudioFrame.from_ndarray(
                wave[None, start : start + 1000], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = rate, start
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return buffer.getvalue()


def broken(data: bytes, seed: int) -> bytes:
    """The bytes cut short, or with some of them changed, or followed by noise."""
    rng = np.random.default_rng(seed)
    kind = seed % 3
    if kind == 0:
        return data[: int(rng.integers(0, len(data)))]
    out = bytearray(data)
    if kind == 1:
        for _ in range(int(rng.integers(1, 12))):
            out[int(rng.integers(0, min(len(out), 400)))] = int(rng.integers(0, 256))
        return bytes(out)
    keep = int(rng.integers(4, 64))
    return data[:keep] + rng.bytes(min(len(data), 2000))
