"""Captions of the toy world: combinations that were trained on, and combinations held out."""

from __future__ import annotations

from collections.abc import Sequence

from onellm_dist.evaluation.report import Caption, ModalityResult, summarise_captions
from onellm_dist.shards.sources.toyworld import world

SPLITS = ("test_seen", "test_held_out")
"""The splits that are captioned."""


def score_toy_captions(captions: Sequence[Caption]) -> list[ModalityResult]:
    """Score captions beside a shuffled control and a caption drawn evenly from all of them."""
    return summarise_captions(captions, get_every_caption())


def get_every_caption() -> dict[str, list[str]]:
    """Modality to every caption that the toy world can write."""
    return {
        name: [
            world.make_caption(name, world.to_attributes(name, combination))
            for combination in world.list_combinations(name)
        ]
        for name in world.MODALITIES
    }
