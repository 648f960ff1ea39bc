"""Small media and datasets for the tests of shards and of benchmarks."""

from __future__ import annotations

import io
import tarfile
import wave
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.format.writer import DatasetWriter


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """A real picture of 24 x 32 random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def sound(seed: int) -> bytes:
    """A real wav of 0.2 s of noise at 16 kHz."""
    samples = np.random.default_rng(seed).integers(-2000, 2000, 3200, dtype=np.int16)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def array(shape: tuple[int, ...], seed: int = 0) -> bytes:
    """A `.npy` of floats in [0, 1)."""
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(seed).random(shape, dtype=np.float32))
    return buffer.getvalue()


def write_tree(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """Files below `root`, by relative path."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def text_dataset(root: Path, samples: Mapping[str, Mapping[str, bytes]], **options: Any) -> Dataset:
    """A dataset without modalities."""
    with DatasetWriter(root, name="texts", modalities=(), **options) as writer:
        for key, parts in samples.items():
            writer.add("train", key, parts)
    return open_dataset(root)


def contents(dataset: Dataset, split: str = "train") -> dict[str, dict[str, bytes]]:
    """Key to parts, through the index, in order."""
    found = {}
    for shard in dataset.shards(split):
        index = dataset.index(shard)
        for row in range(index.samples):
            found[index.key(row)] = {e: p.data for e, p in read_parts(dataset, shard, row).items()}
    return found


def all_bytes(root: Path) -> dict[str, bytes]:
    """Every file below `root`."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def foreign_tar(
    path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT
) -> Path:
    """A tar as another tool would write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def split_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `build_dataset`: its own ones, and all others as `options`."""
    own = {"workers", "seed", "overwrite", "restart", "task"}
    arguments = {name: value for name, value in given.items() if name in own}
    return {**arguments, "options": {n: v for n, v in given.items() if n not in own}}
