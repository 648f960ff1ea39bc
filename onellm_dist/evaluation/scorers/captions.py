"""Scores of generated captions: 95% intervals, a shuffled-input control, and chance.

Exact match and token F1 are those of SQuAD (Rajpurkar et al. 2016, section 6.1), over lower-case
words. Proportions have Wilson's interval (1927), means the percentile bootstrap.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054


def normalise_text(text: str) -> str:
    """Return a text in lower case, without punctuation, with single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 if both texts are the same after `normalise_text`, else 0.0."""
    return float(normalise_text(prediction) == normalise_text(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words; 1.0 for two empty texts."""
    predicted = Counter(normalise_text(prediction).split())
    wanted = Counter(normalise_text(reference).split())
    if not predicted and not wanted:
        return 1.0
    common = sum((predicted & wanted).values())
    return 2 * common / (predicted.total() + wanted.total())


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% interval."""

    mean: float
    low: float
    high: float

    def is_above(self, other: Interval) -> bool:
        """Return whether the whole interval lies above the whole other one."""
        return self.low > other.high

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson_interval(successes: float, n: int) -> Interval:
    """Return Wilson's score interval of a proportion.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError("an interval needs at least one sample")
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * float(np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = 4000) -> Interval:
    """Return the mean with its percentile bootstrap interval.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("an interval needs at least one sample")
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), size=(resamples, len(data)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high))


@dataclass(frozen=True)
class Scores:
    """Exact match and token F1 of n captions."""

    n: int
    exact_match: Interval
    token_f1: Interval


def score_captions(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Score predictions against references in the same order.

    Raises:
        ValueError: the numbers differ, or there is nothing to score.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    pairs = list(zip(predictions, references, strict=True))
    matches = sum(exact_match(p, r) for p, r in pairs)
    return Scores(
        n=len(pairs),
        exact_match=wilson_interval(matches, len(pairs)),
        token_f1=bootstrap_mean([token_f1(p, r) for p, r in pairs]),
    )


def draw_derangement(n: int, seed: int) -> list[int]:
    """Draw a cyclic permutation of n >= 2 places: no place keeps its own (Sattolo 1986).

    Raises:
        ValueError: n < 2.
    """
    if n < 2:
        raise ValueError("a derangement needs at least two places")
    rng = np.random.default_rng(seed)
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = int(rng.integers(0, i))
        order[i], order[j] = order[j], order[i]
    return order


def score_shuffled(
    predictions: Sequence[str], references: Sequence[str], *, seed: int = 0
) -> Scores:
    """Score the control in which every sample is given another sample's input.

    The prompt is the same for every sample and decoding is greedy, so the caption for sample j's
    input is the prediction that already exists for j; it is scored against the reference of i. The
    model is not run again.
    """
    order = draw_derangement(len(references), seed)
    return score_captions([predictions[j] for j in order], references)


def compute_chance(references: Sequence[str], candidates: Sequence[str]) -> tuple[float, float]:
    """Return the expected (exact match, token F1) of a caption drawn evenly from `candidates`."""
    counts = Counter(references)
    em = f1 = 0.0
    for reference, times in counts.items():
        em += times * float(np.mean([exact_match(c, reference) for c in candidates]))
        f1 += times * float(np.mean([token_f1(c, reference) for c in candidates]))
    return em / len(references), f1 / len(references)
