"""Datasets of preference pairs: chosen answers are longer, and in another order of words."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.writer import DatasetWriter

COLOURS = ("red", "blue", "green")
SHAPES = ("cube", "sphere", "cone")
FILLERS = ("green", "small", "large", "left", "right", "above", "of", "a", "yellow", "cylinder")


def make_meta(number: int, *, swapped: bool = False) -> dict[str, object]:
    """The `.json` of a pair; texts differ in length from pair to pair."""
    rng = np.random.default_rng(number)
    size, colour = ("small", "large")[rng.integers(2)], COLOURS[rng.integers(3)]
    shape, more = SHAPES[rng.integers(3)], " left of a red cube" * int(rng.integers(2))
    chosen, rejected = f"a {size} {colour} {shape}{more}", f"{shape} {colour}"
    if swapped:
        chosen, rejected = rejected, chosen
    return {
        "conversations": [
            {"from": "human", "value": "what is it"},
            {"from": "gpt", "value": "a cube"},
            {"from": "human", "value": "what is it " * int(rng.integers(1, 3))},
        ],
        "chosen": [{"from": "gpt", "value": chosen}],
        "rejected": [{"from": "gpt", "value": rejected}],
    }


def make_noisy_meta(number: int) -> dict[str, object]:
    """The `.json` of a pair of random words, of which one word decides: red is chosen, not blue."""
    rng = np.random.default_rng([number, 1])
    answers = []
    for word in ("red", "blue"):
        words = [str(w) for w in rng.choice([*SHAPES, *FILLERS], rng.integers(5, 10))]
        words.insert(int(rng.integers(len(words))), word)
        answers.append([{"from": "gpt", "value": " ".join(words)}])
    question = {"from": "human", "value": "what is it"}
    return {"conversations": [question], "chosen": answers[0], "rejected": answers[1]}


def write_pairs(
    root: Path,
    name: str = "pairs",
    *,
    splits: dict[str, int],
    modalities: Sequence[str] = ("image",),
    broken: Sequence[int] = (),
    noisy: bool = False,
) -> Dataset:
    """A dataset `root/name`, with so many pairs in each split.

    Args:
        root: the folder of the dataset's folder.
        name: its name.
        splits: name of each split to its pairs.
        modalities: ("image",) or ().
        broken: numbers of pairs whose picture no decoder can read.
        noisy: whether the answers are those of `make_noisy_meta`.
    """
    number = 0
    with DatasetWriter(
        root / name, name=name, modalities=tuple(modalities), max_samples=7
    ) as writer:
        for split, count in splits.items():
            for _ in range(count):
                meta = make_noisy_meta(number) if noisy else make_meta(number)
                parts = {"json": json.dumps(meta).encode()}
                if modalities:
                    parts["png"] = b"no picture" if number in broken else _draw(number)
                writer.add(split, f"pair-{number:04d}", parts)
                number += 1
    return open_dataset(root / name)


def _draw(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
