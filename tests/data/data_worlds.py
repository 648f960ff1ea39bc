"""Small datasets for the data tests: real media bytes in real tars, with the toy tokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer

import onellm_dist
from onellm_dist.config.schema import DataSection, MixtureEntry
from onellm_dist.data.plan import Plan
from onellm_dist.data.text import TextEncoder, TextFormat
from onellm_dist.modalities import Part
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.writer import DatasetWriter

SHAPES = {"fmri": (1, 15724), "imu": (6, 400)}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(
        Path(onellm_dist.__file__).parent / "model" / "assets" / "toy_tokenizer"
    )


def encode(
    parts: Mapping[str, Part], tok: Any, text_format: TextFormat, max_tokens: int
) -> tuple[list[int], list[int]]:
    """Ids and labels of one sample."""
    return TextEncoder(tok, text_format, max_tokens).encode(parts)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def png(rng: np.random.Generator, side: int = 24) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def media(modality: str, rng: np.random.Generator) -> dict[str, bytes]:
    """Parts of one sample with the modality image, imu or fmri."""
    if modality == "image":
        return {"png": png(rng)}
    return {f"{modality}.npy": npy(rng.standard_normal(SHAPES[modality]).astype(np.float32))}


def caption(number: int) -> str:
    return " ".join(["a red cube left of a small blue sphere"] * (1 + number % 3))


def write(
    root: Path,
    name: str,
    modalities: Sequence[str],
    samples: int,
    *,
    per_shard: int = 7,
    broken: Sequence[int] = (),
    split: str = "train",
) -> Dataset:
    """A dataset `root/name`; samples in `broken` have media that no decoder can read."""
    with DatasetWriter(
        root / name, name=name, modalities=tuple(modalities), max_samples=per_shard
    ) as writer:
        for number in range(samples):
            rng = np.random.default_rng([number, len(name)])
            parts = {k: v for m in modalities for k, v in media(m, rng).items()}
            if number in broken:
                parts = dict.fromkeys(parts, b"this is not media.")
            talk = [
                {"from": "human", "value": "<image>\nwhat is it"},
                {"from": "gpt", "value": caption(number)},
            ]
            parts |= {
                "txt": caption(number).encode(),
                "json": json.dumps({"conversations": talk}).encode(),
            }
            writer.add(split, f"{name}-{number:04d}", parts)
    return open_dataset(root / name)


def section(root: Path | str, mixture: dict[str, float], **keys: Any) -> DataSection:
    entries = tuple(
        MixtureEntry(path=Path(name), weight=weight) for name, weight in mixture.items()
    )
    return DataSection(
        root=root,
        mixture=entries,
        **{"global_batch": 12, "pack_llm_tokens": 512, "pack_encoder_tokens": 4096} | keys,
    )


def open_plan(
    root: Path,
    mixture: dict[str, float],
    *,
    seed: int = 0,
    modalities: Sequence[str] = ("image", "imu", "fmri"),
    **keys: Any,
) -> Plan:
    return Plan.open(section(root, mixture, **keys), tokenizer(), seed, modalities, show=False)
