"""The table of results: a modality's scores by split, beside its own shuffled control and chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onellm_dist.evaluation.scorers.captions import (
    Interval,
    Scores,
    chance,
    exact_match,
    score,
    shuffled_control,
)


@dataclass(frozen=True)
class Caption:
    """One sample's generated caption and its reference."""

    key: str
    modality: str
    split: str
    reference: str
    prediction: str


@dataclass(frozen=True)
class SplitResult:
    """Scores of one modality on one split."""

    own: Scores
    shuffled: Scores
    chance: tuple[float, float]
    """(exact match, token F1) of a caption drawn evenly from all of the modality's."""
    example: Caption

    @property
    def beats_control(self) -> bool:
        """Token F1's whole 95% interval lies above the shuffled control's."""
        return self.own.token_f1.above(self.shuffled.token_f1)


@dataclass(frozen=True)
class ModalityResult:
    """Scores of one modality, by split."""

    modality: str
    splits: Mapping[str, SplitResult]


def summarise(
    captions: Sequence[Caption], candidates: Mapping[str, Sequence[str]]
) -> list[ModalityResult]:
    """Score captions by modality and split, in the order in which these first come.

    Args:
        captions: what the model said.
        candidates: modality -> every caption that the modality can have (chance draws from these).
    """
    modalities = list(dict.fromkeys(c.modality for c in captions))
    return [
        ModalityResult(
            m,
            {
                s: _split([c for c in captions if c.modality == m and c.split == s], candidates[m])
                for s in dict.fromkeys(c.split for c in captions if c.modality == m)
            },
        )
        for m in modalities
    ]


def _split(captions: Sequence[Caption], candidates: Sequence[str]) -> SplitResult:
    predictions, references = [c.prediction for c in captions], [c.reference for c in captions]
    # The example is the first right caption where most are right, else the first wrong one: it shows what is usual.
    matches = [bool(exact_match(p, r)) for p, r in zip(predictions, references, strict=True)]
    usual = sum(matches) * 2 >= len(matches)
    example = next(
        (c for c, right in zip(captions, matches, strict=True) if right == usual), captions[0]
    )
    return SplitResult(
        score(predictions, references),
        shuffled_control(predictions, references),
        chance(references, candidates),
        example,
    )


def as_text(results: Sequence[ModalityResult]) -> str:
    """The table for a terminal."""
    head = [
        "modality",
        "split",
        "n",
        "exact match",
        "token F1",
        "shuffled EM",
        "shuffled F1",
        "chance EM/F1",
        "beats",
        "example",
    ]
    rows = [head]
    for result in results:
        for name, r in result.splits.items():
            right = exact_match(r.example.prediction, r.example.reference)
            example = repr(r.example.prediction) + (
                "" if right else f" for {r.example.reference!r}"
            )
            own = [str(r.own.n), str(r.own.exact_match), str(r.own.token_f1)]
            control = [
                str(r.shuffled.exact_match),
                str(r.shuffled.token_f1),
                f"{r.chance[0]:.3f}/{r.chance[1]:.2f}",
            ]
            rows.append(
                [
                    result.modality,
                    name.removeprefix("test_"),
                    *own,
                    *control,
                    "yes" if r.beats_control else "NO",
                    example,
                ]
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    )


def as_json(results: Sequence[ModalityResult]) -> list[dict[str, Any]]:
    """The table for a program."""

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
