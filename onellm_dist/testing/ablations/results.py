"""The result of one entry of the queue: how many captions of each modality are right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onellm_dist.evaluation.captioning import read_captions
from onellm_dist.evaluation.scorers.captions import exact_match, token_f1
from onellm_dist.testing.ablations.layout import Entry


@dataclass(frozen=True)
class SplitScore:
    """Captions of one modality on one split."""

    n: int
    right: int
    """Captions of which every word is right."""
    token_f1: float
    """Mean of the captions."""


@dataclass(frozen=True)
class EntryResult:
    """What a variant with a seed reached."""

    variant: str
    seed: int
    scores: Mapping[str, Mapping[str, SplitScore]]
    """Modality -> split -> score."""
    seconds: float
    """What the last start took."""

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EntryResult:
        """Convert from the result of `to_json`."""
        scores = {
            modality: {split: SplitScore(**score) for split, score in splits.items()}
            for modality, splits in value["scores"].items()
        }
        return cls(value["variant"], value["seed"], scores, value["seconds"])


def score_entry(entry: Entry, captions: Sequence[Path], seconds: float) -> EntryResult:
    """Score the captions of an entry.

    Args:
        entry: the entry.
        captions: its files of captions.
        seconds: what it took.
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for path in captions:
        for caption in read_captions(path):
            pair = (caption.prediction, caption.reference)
            splits = found.setdefault(caption.modality, {})
            splits.setdefault(caption.split, []).append((exact_match(*pair), token_f1(*pair)))
    scores = {
        modality: {
            split: SplitScore(
                len(pairs), round(sum(p[0] for p in pairs)), sum(p[1] for p in pairs) / len(pairs)
            )
            for split, pairs in splits.items()
        }
        for modality, splits in found.items()
    }
    return EntryResult(entry.variant.name, entry.seed, scores, seconds)


def list_results(out: Path) -> list[EntryResult]:
    """Read all results below the folder of an ablation."""
    return [
        EntryResult.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted((out / "results").glob("*.json"))
    ]
