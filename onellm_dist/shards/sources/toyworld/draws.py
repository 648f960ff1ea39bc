"""Scene and random numbers of a sample: pure functions of (seed, modality, split, index)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.toyworld import world

DATASET_SPLITS = ("train", "test_seen", "test_held_out")
"""The splits that are written.

`train` has trained combinations, `test_seen` new renderings of trained combinations, and
`test_held_out` held-out combinations."""
SPLITS = (*DATASET_SPLITS, "pretrain")
"""All splits. `pretrain` is never written: it renders trained combinations for the toy towers."""


@dataclass(frozen=True)
class RenderedMedia:
    """The media of one sample.

    Attributes:
        parts: extension to bytes, as in the shards.
        facts: what the renderer chose beyond the attributes; it is stored in the sample's `.json`.
    """

    parts: dict[str, bytes]
    facts: dict[str, object] = field(default_factory=dict)


def choose_attributes(modality: str, split: str, index: int, seed: int) -> dict[str, str]:
    """Choose the scene of a sample.

    Combinations come in shuffled order; each comes once before any comes again.

    Raises:
        UsageError: the modality or the split is unknown.
    """
    held_out = split == "test_held_out"
    pool = sorted(world.get_held_out(modality)) if held_out else world.get_trained(modality)
    round_number, place = divmod(index, len(pool))
    order = _make_generator(seed, modality, split, 0, round_number).permutation(len(pool))
    return world.to_attributes(modality, pool[order[place]])


def make_rng(modality: str, split: str, index: int, seed: int) -> np.random.Generator:
    """Make the random generator of a sample's rendering."""
    return _make_generator(seed, modality, split, 1, index)


def _make_generator(
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
