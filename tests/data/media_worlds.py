"""Datasets whose samples list their media: any number, numbered parts, placeholders."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data_worlds import media, png

from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.media import LISTED, make_numbered_parts
from onellm_dist.shards.format.writer import DatasetWriter

MODALITIES = ("image", "imu", "fmri")


def wav(seconds: float, rate: int = 8000, pitch: float = 440.0) -> bytes:
    """A tone."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        tone = np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate) * 9000
        file.writeframes(tone.astype("<i2").tobytes())
    return out.getvalue()


def make_sample(
    names: Sequence[str], text: str, rng: np.random.Generator, answer: str = "a red cube"
) -> dict[str, bytes]:
    """The parts of a sample with these media, whose question is `text`."""
    parts, listed = make_numbered_parts((name, media(name, rng)) for name in names)
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    meta = {"conversations": turns, "caption": f"{text} {answer}", "media": listed}
    return parts | {"json": json.dumps(meta).encode()}


def draw_text(names: Sequence[str], rng: np.random.Generator) -> str:
    """Words with a placeholder for each medium, at random places; sometimes with none at all."""
    words = ["what", "is", "the", "blue", "sphere", "left", "of"][: int(rng.integers(1, 8))]
    if rng.integers(4) == 0:
        return " ".join(words)
    for name in names:
        words.insert(int(rng.integers(len(words) + 1)), f"<{name}>")
    return " ".join(words)


def write_media(
    root: Path, name: str, samples: int, *, most: int = 6, per_shard: int = 7, seed: int = 0
) -> Dataset:
    """A dataset of samples with 0 to `most` media."""
    with DatasetWriter(
        root / name, name=name, modalities=MODALITIES, attributes=LISTED, max_samples=per_shard
    ) as writer:
        for number in range(samples):
            rng = np.random.default_rng([seed, number])
            names = rng.choice(MODALITIES, int(rng.integers(0, most + 1))).tolist()
            sample = make_sample(names, draw_text(names, rng), rng)
            writer.add("train", f"{name}-{number:04d}", sample)
    return open_dataset(root / name)


def write_wide(root: Path, name: str, sizes: Sequence[tuple[int, int]], **writer: Any) -> Dataset:
    """A dataset of one picture a sample, each of its own size."""
    from PIL import Image

    with DatasetWriter(root / name, name=name, modalities=("image",), **writer) as dataset:
        for number, size in enumerate(sizes):
            out = io.BytesIO()
            colour = (number * 40 % 255, 80, 120)
            Image.new("RGB", size, colour).save(out, "PNG")
            sample = {"png": out.getvalue(), "txt": b"a red cube"}
            dataset.add("train", f"{number:04d}", sample)
    return open_dataset(root / name)


__all__ = [
    "MODALITIES",
    "draw_text",
    "make_sample",
    "png",
    "wav",
    "write_media",
    "write_wide",
]
