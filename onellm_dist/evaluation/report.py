"""The table of results: scores by modality and split, beside a shuffled control and chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onellm_dist.evaluation.scorers.captions import (
    Interval,
    Scores,
    compute_chance,
    exact_match,
    score_captions,
    score_shuffled,
)

HEADINGS = (
    "modality",
    "split",
    "n",
    "exact match",
    "token F1",
    "shuffled EM",
    "shuffled F1",
    "chance EM/F1",
    "above control",
    "example",
)


@dataclass(frozen=True)
class Caption:
    """The generated caption of one sample, and its reference."""

    key: str
    """Key of the sample in its dataset."""
    modality: str
    """The sample's modality combination."""
    split: str
    """The split the sample belongs to."""
    reference: str
    """The correct caption."""
    prediction: str
    """What the model generated."""


@dataclass(frozen=True)
class SplitResult:
    """Scores of one modality on one split."""

    own: Scores
    """Scores with the samples' own inputs."""
    shuffled: Scores
    """Scores if every sample is given another sample's input."""
    chance: tuple[float, float]
    """(exact match, token F1) of a caption drawn evenly from all captions of the modality."""
    example: Caption
    """A typical answer."""

    @property
    def beats_control(self) -> bool:
        """Whether the 95% interval of token F1 lies entirely above the shuffled control's."""
        return self.own.token_f1.is_above(self.shuffled.token_f1)


@dataclass(frozen=True)
class ModalityResult:
    """Scores of one modality, by split."""

    modality: str
    splits: Mapping[str, SplitResult]


def summarise_captions(
    captions: Sequence[Caption], candidates: Mapping[str, Sequence[str]]
) -> list[ModalityResult]:
    """Score captions by modality and split, in the order of their first appearance.

    Args:
        captions: what the model generated.
        candidates: modality to every caption it can have; chance draws from these.
    """
    by_split: dict[str, dict[str, list[Caption]]] = {}
    for caption in captions:
        by_split.setdefault(caption.modality, {}).setdefault(caption.split, []).append(caption)
    return [
        ModalityResult(
            modality,
            {split: _score_split(own, candidates[modality]) for split, own in splits.items()},
        )
        for modality, splits in by_split.items()
    ]


def _score_split(captions: Sequence[Caption], candidates: Sequence[str]) -> SplitResult:
    predictions = [c.prediction for c in captions]
    references = [c.reference for c in captions]
    # The example is typical: the first correct caption if most are correct, else the first wrong.
    matches = [bool(exact_match(p, r)) for p, r in zip(predictions, references, strict=True)]
    typical = sum(matches) * 2 >= len(matches)
    example = next(
        (c for c, right in zip(captions, matches, strict=True) if right == typical), captions[0]
    )
    return SplitResult(
        own=score_captions(predictions, references),
        shuffled=score_shuffled(predictions, references),
        chance=compute_chance(references, candidates),
        example=example,
    )


def format_table(results: Sequence[ModalityResult]) -> str:
    """Return the table of results for a terminal."""
    rows = [
        list(HEADINGS),
        *(_format_row(m.modality, s, r) for m in results for s, r in m.splits.items()),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS) - 1)]
    return "\n".join(
        "  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in rows
    )


def _format_row(modality: str, split: str, result: SplitResult) -> list[str]:
    own, shuffled, example = result.own, result.shuffled, result.example
    shown = repr(example.prediction)
    if not exact_match(example.prediction, example.reference):
        shown += f" for {example.reference!r}"
    return [
        modality,
        split.removeprefix("test_"),
        str(own.n),
        str(own.exact_match),
        str(own.token_f1),
        str(shuffled.exact_match),
        str(shuffled.token_f1),
        f"{result.chance[0]:.3f}/{result.chance[1]:.2f}",
        "yes" if result.beats_control else "NO",
        shown,
    ]


def to_json_rows(results: Sequence[ModalityResult]) -> list[dict[str, Any]]:
    """Return the table of results as JSON objects, one per modality and split."""

    def interval(i: Interval) -> dict[str, float]:
        return {"mean": i.mean, "low": i.low, "high": i.high}

    def scores(s: Scores) -> dict[str, Any]:
        return {"n": s.n, "exact_match": interval(s.exact_match), "token_f1": interval(s.token_f1)}

    return [
        {
            "modality": m.modality,
            "split": name,
            "own": scores(r.own),
            "shuffled": scores(r.shuffled),
            "chance": {"exact_match": r.chance[0], "token_f1": r.chance[1]},
            "beats_control": r.beats_control,
            "example": {"reference": r.example.reference, "prediction": r.example.prediction},
        }
        for m in results
        for name, r in m.splits.items()
    ]
