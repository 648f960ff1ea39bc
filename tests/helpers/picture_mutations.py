"""Pictures, films and maps as they lie on disks: damaged, tagged, turned, repacked, renamed."""

from __future__ import annotations

import io
from contextlib import suppress
from functools import cache
from typing import Any

import av
import numpy as np
from media_samples import npy, photo, video
from PIL import Image, PngImagePlugin

from onellm_dist.modalities import Part

MODALITIES = ("image", "video", "depth", "normal")
_PICTURE_FORMS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_PICTURE_MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "I;16")
_CONTAINERS = (("mp4", "libx264"), ("mp4", "mpeg4"), ("matroska", "libx264"), ("avi", "mpeg4"))


@cache
def make_film(number: int, rotation: int) -> bytes:
    """A short film in one of four containers, with a rotation in degrees that mp4 states."""
    container, codec = _CONTAINERS[number]
    turn = rotation if container == "mp4" and rotation else None
    size, options = (96, 64), {"g": "8"}
    return video(container, codec, frames=24, fps=8, size=size, options=options, rotation=turn)


def make_picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A picture in any mode and form."""
    mode = str(rng.choice(_PICTURE_MODES))
    image = photo(width, height, int(rng.integers(3)))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image = image.convert(mode)
    else:
        image = image.convert(mode)
    form = str(rng.choice(_PICTURE_FORMS if mode in ("RGB", "L") else ("PNG", "TIFF")))
    exif = Image.Exif()
    if rng.random() < 0.4:
        exif[0x0112] = int(rng.integers(0, 10))
    info = PngImagePlugin.PngInfo()
    if rng.random() < 0.3:
        info.add_text("workflow", "x" * 1_100_000, zip=True)
    options: dict[str, Any] = {"exif": exif} if form not in ("GIF", "BMP", "JPEG2000") else {}
    if form == "PNG":
        options["pnginfo"] = info
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def make_map(rng: np.random.Generator, modality: str, width: int, height: int) -> Part:
    """A map as PNG or as an array."""
    if rng.random() < 0.4:
        return Part(f"{modality}.png", make_picture(rng, width, height))
    shape = (height, width) if modality == "depth" else (height, width, 3)
    values = rng.uniform(0.1, 0.9, shape).astype(rng.choice(["f4", "f8", "f2"]))
    if rng.random() < 0.4:
        values[: height // 3] = rng.choice([np.nan, np.inf, -np.inf, 0.0, 3e4])
    return npy(values, f"{modality}.npy")


def repack(rng: np.random.Generator, data: bytes) -> bytes:
    """The same packets in another container."""
    buffer = io.BytesIO()
    form = str(rng.choice(["mp4", "matroska", "avi", "mpegts", "mov"]))
    with av.open(io.BytesIO(data), "r") as source, av.open(buffer, "w", format=form) as out:
        film = source.streams.video[0]
        copied = out.add_stream_from_template(film)
        for packet in source.demux(film):
            if packet.dts is not None:
                packet.stream = copied
                out.mux(packet)
    return buffer.getvalue()


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """Cut, flip, wipe, or pad some bytes; one time in four nothing."""
    kind = int(rng.integers(0, 8))
    changed = bytearray(data)
    if kind == 0:
        return data[: int(rng.integers(0, len(data)))]
    if kind == 1:
        return data[: int(len(data) * rng.uniform(0.8, 1))]
    if kind == 2:
        return data + bytes(int(rng.integers(1, 3000)))
    if kind == 3:
        return rng.bytes(int(rng.integers(1, 300))) + data
    if kind == 4:
        at = int(rng.integers(0, len(data)))
        changed[at : at + 40] = bytes(len(changed[at : at + 40]))
    elif kind == 5:
        for _ in range(int(rng.integers(1, 8))):
            changed[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def make_sample(modality: str, seed: int) -> dict[str, Part]:
    """Role to part of one sample, a function of modality and seed."""
    rng = np.random.default_rng([seed, MODALITIES.index(modality)])
    if modality == "image":
        extension = str(rng.choice(["jpg", "png", "webp", "tif"]))
        return {"image": Part(extension, damage(rng, make_picture(rng, 60, 40)))}
    if modality == "video":
        film = make_film(int(rng.integers(4)), int(rng.choice([0, 0, 90, 180])))
        if rng.random() < 0.3:
            with suppress(av.FFmpegError):  # a container that does not take the codec
                film = repack(rng, film)
        return {"video": Part(str(rng.choice(["mp4", "mkv", "avi"])), damage(rng, film))}
    width, height = ((60, 40), (40, 60), (48, 48))[int(rng.integers(3))]
    turned = (width, height) if rng.random() < 0.8 else (height, width)
    chart, shown = make_map(rng, modality, *turned), make_picture(rng, width, height)
    if rng.random() < 0.5:
        chart = Part(chart.extension, damage(rng, chart.data))
    else:
        shown = damage(rng, shown)
    return {modality: chart, "image": Part("jpg", shown)}
