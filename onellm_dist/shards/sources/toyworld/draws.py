"""Who is drawn: the scene and the random stream of a sample, as pure functions of (seed, modality, split, index)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.toyworld import world

DATASET_SPLITS = ("train", "test_seen", "test_held_out")
"""What is written: trained combinations; new renderings of trained combinations; held-out combinations."""
SPLITS = (*DATASET_SPLITS, "pretrain")
"""`pretrain` is never written: renderings of trained combinations for the stand-in towers."""


@dataclass(frozen=True)
class RenderedMedia:
    """The media of one sample.

    Attributes:
        parts: extension to bytes, as in the shards.
        facts: what the renderer decided beyond the attributes (kept in the sample's `.json`).
    """

    parts: dict[str, bytes]
    facts: dict[str, object] = field(default_factory=dict)


def choose_attributes(modality: str, split: str, index: int, seed: int) -> dict[str, str]:
    """The scene of a sample. Every combination of the split comes once before any comes again, in a shuffled order.

    Raises:
        UsageError: unknown modality or split.
    """
    pool = (
        sorted(world.get_held_out(modality))
        if split == "test_held_out"
        else world.get_trained(modality)
    )
    lap, place = divmod(index, len(pool))
    order = _generator(seed, modality, split, 0, lap).permutation(len(pool))
    return world.to_attributes(modality, pool[order[place]])


def make_rng(modality: str, split: str, index: int, seed: int) -> np.random.Generator:
    """The random numbers of a sample's rendering."""
    return _generator(seed, modality, split, 1, index)


def _generator(
    seed: int, modality: str, split: str, purpose: int, number: int
) -> np.random.Generator:
    if split not in SPLITS:
        raise UsageError(
            f"the toy world has no split {split!r}",
            "nothing can be rendered.",
            f"use one of: {', '.join(SPLITS)}.",
        )
    return np.random.default_rng(
        [seed, zlib.crc32(modality.encode()), zlib.crc32(split.encode()), purpose, number]
    )
