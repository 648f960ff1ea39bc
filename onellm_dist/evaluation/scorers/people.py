"""Clotho-AQA: three people answered each question."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.scorers.labels import collect_labels
from onellm_dist.evaluation.scorers.measure import Measure

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_YES_NO = ("yes", "no")


def normalise(text: str) -> str:
    """Lower case without ASCII punctuation, as lmms-eval compares; white space outside goes too."""
    return text.lower().translate(_NO_PUNCTUATION).strip()


def is_same(answer: str, reference: str) -> bool:
    """Whether an answer is a reference; an empty one is none."""
    said = normalise(answer)
    return bool(said) and said == normalise(reference)


def measure_people(answers: Sequence[GivenAnswer]) -> list[Measure]:
    """Right for any, for most, and where all agree; and of each person's answer.

    The last are the two accuracies of the dataset's own program (AquaNet): over the answers `yes`
    and `no` of single people, and over their other ones.
    """
    measures = []
    for name, least in (("any", 1), ("majority", 2), ("unanimous", 3)):
        counted = [a for a in answers if _count_most(a.question.answers) >= least]
        values = {a.question.id: float(_is_right(a, least)) for a in counted}
        if values:
            labels = collect_labels(counted)
            measures.append(Measure.from_values(f"exact match ({name})", values, labels))
    for name, yes_no in (("yes or no", True), ("one word", False)):
        measures += _measure_each(f"each person's answer ({name})", answers, yes_no=yes_no)
    return measures


def _is_right(answer: GivenAnswer, least: int) -> bool:
    people = answer.question.answers
    return any(is_same(answer.text, one) for one in people if _count(one, people) >= least)


def _measure_each(name: str, answers: Sequence[GivenAnswer], *, yes_no: bool) -> list[Measure]:
    """The share of single people's answers that are hit; drawn question by question."""
    asked, rows = [], []
    for answer in answers:
        people = [p for p in answer.question.answers if (normalise(p) in _YES_NO) == yes_no]
        if people:
            asked.append(answer.question.id)
            rows.append([sum(is_same(answer.text, p) for p in people), len(people)])
    return [Measure(name, asked, np.array(rows, dtype=np.float64))] if asked else []


def _count(reference: str, references: Sequence[str]) -> int:
    return sum(normalise(r) == normalise(reference) for r in references)


def _count_most(references: Sequence[str]) -> int:
    return max(_count(r, references) for r in references)
