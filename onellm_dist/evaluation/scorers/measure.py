"""A score with its 95% interval: sums over units, and the number that they make.

A unit is what is drawn again by the bootstrap: a question, or all questions about one picture where
a rule counts them together. Proportions of single questions have Wilson's interval, everything else
the percentile bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onellm_dist.evaluation.scorers.captions import Interval, wilson_interval

RESAMPLES = 2000
SEED = 0
_CHUNK = 4_000_000
"""Numbers of a block of resamples."""

Combine = Callable[[np.ndarray], np.ndarray]
"""[..., k] sums over units -> [...] scores."""


def compute_mean(sums: np.ndarray) -> np.ndarray:
    """(sum, count) -> 100 * mean; 0 of nothing."""
    ratio: np.ndarray = 100 * sums[..., 0] / np.maximum(sums[..., 1], 1)
    return ratio


@dataclass(frozen=True)
class Measure:
    """One score of a task."""

    name: str
    units: Sequence[str]
    """What the rows are: ids of questions, or of media."""
    rows: np.ndarray
    """[n, k] what each unit adds to the sums."""
    combine: Combine = compute_mean
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Table of categories -> the category of each unit."""
    questions: int = 0
    """Questions behind it; 0: as many as units."""
    is_share: bool = False
    """Whether each unit is right or wrong, so that Wilson's interval holds."""

    @classmethod
    def from_values(
        cls,
        name: str,
        values: Mapping[str, float],
        labels: Mapping[str, Sequence[str]] | None = None,
        *,
        graded: bool = False,
    ) -> Measure:
        """Make the mean of one value (0 to 1) per question.

        Args:
            name: of the measure.
            values: id of a question -> value.
            labels: table -> category of each question, in the same order.
            graded: whether a value is more than right or wrong.
        """
        rows = np.array([[v, 1.0] for v in values.values()], dtype=np.float64).reshape(-1, 2)
        share = bool(np.isin(rows[:, 0], (0, 1)).all()) and not graded
        return cls(name, tuple(values), rows, labels=labels or {}, is_share=share)

    @property
    def n(self) -> int:
        """Questions behind the score."""
        return self.questions or len(self.units)

    @property
    def value(self) -> float:
        """The score."""
        return float(self.combine(self.rows.sum(0)))

    def compute_interval(self) -> Interval:
        """The score with its 95% interval."""
        if self.is_share:
            wilson = wilson_interval(float(self.rows[:, 0].sum()), len(self.rows))
            return Interval(100 * wilson.mean, 100 * wilson.low, 100 * wilson.high)
        low, high = np.percentile(self.draw(), [2.5, 97.5])
        return Interval(self.value, float(low), float(high))

    def draw(self) -> np.ndarray:
        """Scores of RESAMPLES draws of the units, with replacement; the same for equal n."""
        return self.combine(draw_sums(self.rows))

    def split(self, table: str) -> dict[str, Measure]:
        """Compute this score for each category of a table, in order of name."""
        found = np.asarray(self.labels[table])
        return {
            str(category): self._select(np.flatnonzero(found == category))
            for category in sorted(set(found.tolist()))
        }

    def keep(self, wanted: set[str]) -> Measure:
        """Compute this score from the named units alone."""
        return self._select(np.array([i for i, u in enumerate(self.units) if u in wanted], int))

    def _select(self, at: np.ndarray) -> Measure:
        labels = {t: [names[i] for i in at] for t, names in self.labels.items()}
        units = [self.units[i] for i in at]
        return replace(self, units=units, rows=self.rows[at], labels=labels, questions=0)


def draw_sums(rows: np.ndarray) -> np.ndarray:
    """[n, k] -> [RESAMPLES, k] sums over n units drawn with replacement."""
    rng, n = np.random.default_rng(SEED), len(rows)
    block = max(1, _CHUNK // max(1, n))
    drawn = [
        rows[rng.integers(0, n, size=(min(block, RESAMPLES - first), n))].sum(1)
        for first in range(0, RESAMPLES, block)
    ]
    return np.concatenate(drawn)
