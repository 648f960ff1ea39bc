"""Media and tables that the benchmarks' layouts are made of."""

from __future__ import annotations

import csv
import io
import json
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image
from source_checks import make_film, make_photo, make_tone

Files = dict[str, bytes | str]
ROWS = 4


def photos(pattern: str, count: int = ROWS) -> Files:
    """Pictures by number."""
    kind = "PNG" if pattern.endswith("png") else "JPEG"
    return {pattern.format(i): make_photo(seed=i, kind=kind) for i in range(count)}


def films(pattern: str, count: int = ROWS) -> Files:
    return {pattern.format(i): make_film(seed=i) for i in range(count)}


def make_talkie(seed: int = 0) -> bytes:
    """A mp4 with a picture and a tone of a second."""
    buffer = io.BytesIO()
    rate = 16000
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=Fraction(8))
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio: Any = container.add_stream("aac", rate=rate, layout="mono")
        for i in range(8):
            pixels = np.full((48, 64, 3), 20 * seed + 10 * i, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        wave = (0.3 * np.sin(np.arange(rate) * (0.1 + seed / 50))).astype(np.float32)
        for start in range(0, rate, 1024):
            frame = av.AudioFrame.from_ndarray(
                wave[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = rate, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return buffer.getvalue()


def talkies(pattern: str, count: int = ROWS) -> Files:
    return {pattern.format(i): make_talkie(i) for i in range(count)}


def sounds(pattern: str) -> Files:
    return {pattern.format(i): make_tone("WAV", hertz=300 + 100 * i) for i in range(ROWS)}


def make_depth(seed: int) -> bytes:
    """A depth map as SUN RGB-D stores it: millimetres with their bits turned."""
    rows = np.arange(48, dtype=np.uint32)[:, None] * 40 + 1000 + 100 * seed
    raw = np.broadcast_to(rows, (48, 64)).astype(np.uint32)
    out = io.BytesIO()
    Image.fromarray(((raw << 3) | (raw >> 13)).astype(np.uint16)).save(out, "PNG")
    return out.getvalue()


def table(rows: list[list[Any]], separator: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator="\n").writerows(rows)
    return out.getvalue()


def coco_form(captions: list[list[str]], images: list[dict[str, Any]]) -> str:
    """COCO's form, with a list of captions for each image."""
    annotations = [
        {"id": 100 * i + j, "image_id": image["id"], "caption": text}
        for i, (image, some) in enumerate(zip(images, captions, strict=True))
        for j, text in enumerate(some)
    ]
    return json.dumps({"images": images, "annotations": annotations})


THINGS = ("a red ball on grass", "two dogs in the snow", "an old train", "people on a beach")
CAPTIONS = [[f"{t} today", f"a picture of {t}", t] for t in THINGS]
