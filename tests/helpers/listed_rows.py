"""Rows that list media, and what was built of them."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from onellm_dist.shards.build.build_dataset import build_dataset
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.sources.base import BuildReport


def picture(seed: int = 0, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def sound() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((np.sin(np.arange(8000) / 9) * 9000).astype("<i2").tobytes())
    return out.getvalue()


def build(source: str, inputs: Path, **options: Any) -> tuple[Dataset, BuildReport]:
    out = inputs.parent / f"{source}-out"
    report = build_dataset(source, inputs, out, options={"max_failures": 1.0, **options})
    assert report is not None
    return open_dataset(out), report


def read_all(dataset: Dataset) -> dict[str, tuple[dict[str, bytes], dict[str, Any]]]:
    """Key to the media parts and the `.json` of each sample."""
    found = {}
    for shard in dataset.shards():
        index = dataset.index(shard)
        assert index.media is not None
        for row in range(index.samples):
            parts = {e: p.data for e, p in read_parts(dataset, shard, row).items()}
            meta = json.loads(parts.pop("json"))
            assert [m.modality for m in index.media.get(row)] == meta["media"]
            if "txt" in parts:
                meta["txt"] = parts.pop("txt").decode()
            found[index.key(row)] = parts, meta
    return found


def talk(question: Any, answer: str = "yes", *, openai: bool = False) -> list[dict[str, Any]]:
    who, what, names = (
        ("role", "content", ("user", "assistant"))
        if openai
        else ("from", "value", ("human", "gpt"))
    )
    return [{who: names[0], what: question}, {who: names[1], what: answer}]


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "rows.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(list(rows)))
    return folder


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
