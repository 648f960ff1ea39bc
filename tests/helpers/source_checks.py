"""Building a source from a test's tree, and reading the dataset back as training does."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from shard_worlds import contents, split_arguments

from onellm_dist.modalities import Part, get_modality
from onellm_dist.shards import build_dataset
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.sources.base import BuildReport
from onellm_dist.shards.tools.verify import verify_dataset


def build_source(
    source: str, inputs: Path, out: Path, **options: Any
) -> tuple[BuildReport, Dataset]:
    """Build a dataset; whatever verify finds in it is a failure."""
    report = build_dataset(source, inputs, out, **split_arguments(options))
    assert not verify_dataset(out)
    return report, open_dataset(out)


def read_samples(dataset: Dataset, split: str = "train") -> dict[str, dict[str, Any]]:
    """Key to parts as bytes; `txt` as text, `json` as a value."""
    read: dict[str, Callable[[bytes], Any]] = {"txt": bytes.decode, "json": json.loads}
    return {
        k: {e: read.get(e, bytes)(d) for e, d in parts.items()}
        for k, parts in contents(dataset, split).items()
    }


def decode_sample(dataset: Dataset, key: str, split: str = "train") -> dict[str, torch.Tensor]:
    """Decode a sample as for the model: each of the dataset's modalities to its tensor."""
    parts = contents(dataset, split)[key]
    meta = json.loads(parts.get("json", b"{}"))
    values = {}
    for name in dataset.modalities:
        modality = get_modality(name)
        media = {role: Part(e, parts[e]) for role, e in modality.match(set(parts)).items()}
        values[name] = modality.transform(
            modality.decode(media, meta), train=False, rng=np.random.default_rng(0)
        )
        assert values[name].shape == modality.value_shape
    return values


def get_reasons(report: BuildReport) -> dict[str, str]:
    """Key of each quarantined sample to the reason."""
    assert len({q.key for q in report.quarantined}) == len(report.quarantined)
    return {q.key: q.reason for q in report.quarantined}


def make_turns(*values: str) -> list[dict[str, str]]:
    """Question, answer, question, answer ... as a conversation."""
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def make_photo(size: tuple[int, int] = (64, 48), seed: int = 0, kind: str = "JPEG") -> bytes:
    """A smooth picture whose left is darker than its right, with a bright disc: JPEG keeps it."""
    y, x = np.mgrid[: size[1], : size[0]]
    disc = ((x - size[0] * (0.3 + 0.05 * (seed % 5))) ** 2 + (y - size[1] / 2) ** 2) < (
        min(size) / 4
    ) ** 2
    pixels = np.stack(
        [x * 200 // size[0], np.where(disc, 250, 40), (y + 20 * seed) % 200], -1
    ).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=95)
    return buffer.getvalue()


def make_film(frames: int = 12, seed: int = 0) -> bytes:
    """A real mp4 (MPEG-4 part 2) of 64 x 48 at 8 frames per second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            pixels = np.full((48, 64, 3), (20 * seed) % 200, np.uint8)
            pixels[8:24, 3 * i : 3 * i + 16] = (250, 200, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def make_tone(kind: str = "FLAC", rate: int = 32000, hertz: float = 440.0) -> bytes:
    """A second of sound."""
    buffer = io.BytesIO()
    soundfile.write(
        buffer, 0.3 * np.sin(2 * np.pi * hertz * np.arange(rate) / rate), rate, format=kind
    )
    return buffer.getvalue()


def make_npy(array: Any) -> bytes:
    """A `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


def to_json(value: Any) -> str:
    """A JSON file as annotation tools write it."""
    return json.dumps(value)


def make_cloud(points: int = 8192, seed: int = 0) -> np.ndarray:
    """[points, 6] fp32: positions, then colours in [0, 1]."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=(points, 3)), rng.random((points, 3))], 1).astype(
        np.float32
    )
