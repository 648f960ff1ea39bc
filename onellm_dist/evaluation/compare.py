"""`onellm score --compare A B`: whether two evaluations differ, by the paired bootstrap.

Both are drawn with the same questions in each draw, so that what makes a question hard for both
cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onellm_dist.common.errors import UsageError
from onellm_dist.evaluation.score import TaskScore
from onellm_dist.evaluation.scorers.captions import Interval
from onellm_dist.evaluation.scorers.measure import Measure, draw_sums


@dataclass(frozen=True)
class ScoreDifference:
    """One measure of one task, in two evaluations."""

    task: str
    measure: str
    first: float
    second: float
    difference: Interval
    """Second minus first."""
    units: int
    part: str = ""
    """How many of the split's questions it is about (`TaskScore.describe_part`); "": all."""

    @property
    def is_clear(self) -> bool:
        """Whether the 95% interval of the difference leaves out 0."""
        return self.difference.low > 0 or self.difference.high < 0


def compare_scores(
    first: Sequence[TaskScore], second: Sequence[TaskScore]
) -> list[ScoreDifference]:
    """Compare the tasks that both evaluations have.

    Raises:
        UsageError: they have no task in common, or not the same questions.
    """
    others = {score.task.name: score for score in second}
    shared = [score for score in first if score.task.name in others]
    if not shared:
        raise UsageError(
            "the two evaluations have no task in common",
            "there is nothing to compare.",
            "evaluate both models on one task.",
        )
    found = []
    for score in shared:
        other = others[score.task.name]
        theirs = {measure.name: measure for measure in other.measures}
        part = score.describe_part() or other.describe_part()
        found += [
            replace(compare_measures(score.task.name, measure, theirs[measure.name]), part=part)
            for measure in score.measures
            if measure.name in theirs
        ]
    return found


def compare_measures(task: str, first: Measure, second: Measure) -> ScoreDifference:
    """Compare one measure.

    Raises:
        UsageError: the two are about different questions.
    """
    if sorted(first.units) != sorted(second.units):
        other = sorted(set(first.units) ^ set(second.units))
        raise UsageError(
            f"{task}: the two evaluations asked different questions"
            f"{f' ({other[0]}, ...)' if other else ''}",
            "a paired comparison needs the same ones.",
            "evaluate both with the same --limit and split.",
        )
    places = {unit: place for place, unit in enumerate(second.units)}
    aligned = second.rows[[places[unit] for unit in first.units]]
    width = first.rows.shape[1]
    drawn = draw_sums(np.concatenate([first.rows, aligned], axis=1))
    differences = second.combine(drawn[:, width:]) - first.combine(drawn[:, :width])
    low, high = np.percentile(differences, [2.5, 97.5])
    return ScoreDifference(
        task,
        first.name,
        first.value,
        second.value,
        Interval(second.value - first.value, float(low), float(high)),
        len(first.units),
    )
