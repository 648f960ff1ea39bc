"""MME: accuracy and accuracy+ of each of its tasks, summed over perception and cognition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.scorers.measure import Measure

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_A_PICTURE = 2
"""Questions of a picture."""


def flatten(text: str) -> str:
    """A text as a field of MME's answer files: every white space one space, none outside."""
    return " ".join(text.split())


def read_yes_no(answer: str) -> Literal["yes", "no", "other"]:
    """Read an answer as calculation.py does from its file: within the first four letters."""
    start = flatten(answer).lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def measure_mme(answers: Sequence[GivenAnswer]) -> list[Measure]:
    """Perception, cognition, and each task: 100 * (accuracy + accuracy+), at most 200 a task.

    A picture has two questions; accuracy+ is the share of pictures with both right. One of which a
    question is missing (--limit, --partial, --without) does not count for it.
    """
    pictures: dict[tuple[str, str], list[bool]] = {}
    for answer in answers:
        question = answer.question
        right = read_yes_no(answer.text) == question.answers[0].lower()
        key = (question.labels["task"], question.medium)
        pictures.setdefault(key, []).append(right)
    tasks = sorted({task for task, _ in pictures})
    groups = {"perception": PERCEPTION, "cognition": COGNITION}
    found = [
        _measure_sum(name, [t for t in tasks if t in members], pictures)
        for name, members in groups.items()
    ]
    others = [t for t in tasks if t not in PERCEPTION + COGNITION]
    return [m for m in (*found, _measure_sum("other tasks", others, pictures)) if m is not None]


def _measure_sum(
    name: str, tasks: Sequence[str], pictures: dict[tuple[str, str], list[bool]]
) -> Measure | None:
    """The sum over tasks; columns are right questions, questions, right pictures, pictures."""
    if not tasks:
        return None
    units = [key for key in pictures if key[0] in tasks]
    rows = np.zeros((len(units), len(tasks), 4))
    for i, key in enumerate(units):
        rights = pictures[key]
        rows[i, tasks.index(key[0])] = (
            *(sum(rights), len(rights)),
            *((all(rights), 1) if len(rights) == _A_PICTURE else (0, 0)),
        )
    return Measure(
        name,
        [f"{task}/{medium}" for task, medium in units],
        rows.reshape(len(units), -1),
        add_tasks,
        {"task": [task for task, _ in units]},
        questions=sum(len(pictures[key]) for key in units),
    )


def add_tasks(sums: np.ndarray) -> np.ndarray:
    """[..., 4 * tasks] -> [...]: 100 * (accuracy + accuracy+), summed; an absent task adds 0."""
    tasks = sums.reshape(*sums.shape[:-1], -1, 4)
    accuracy = tasks[..., 0] / np.maximum(tasks[..., 1], 1)
    plus = tasks[..., 2] / np.maximum(tasks[..., 3], 1)
    total: np.ndarray = 100 * (accuracy + plus).sum(-1)
    return total
