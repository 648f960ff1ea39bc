"""Scores that another model gave: OUT/mmvet/grades.jsonl, one line for each reply that was read.

A grade holds for the prompt that it answers, so a changed answer has none. Lines are synced one by
one: what was paid for is never asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import repair_last_line
from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.scorers.labels import collect_labels
from onellm_dist.evaluation.scorers.measure import Measure
from onellm_dist.evaluation.tasks.grading import Grading

GRADES = "grades.jsonl"
_GPT4 = re.compile(r"(?:.*/)?gpt-4(-\d{4})?")
"""gpt-4, gpt-4-0613; not gpt-4o, gpt-4.1 or gpt-4-turbo, which are other models."""


@dataclass(frozen=True)
class Grade:
    """One line."""

    id: str
    """Identifier of the question."""
    model: str
    """Model that graded."""
    prompt: str
    """Digest of what the grader was asked."""
    value: float
    """From 0 to 1."""
    reply: str


def digest_prompt(prompt: str) -> str:
    """What distinguishes a prompt."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_grades(folder: Path) -> dict[tuple[str, str], dict[str, Grade]]:
    """Read the grades of a task: (model, digest of the prompt) -> id -> grade.

    Raises:
        OneLLMError: a line is damaged.
    """
    found: dict[tuple[str, str], dict[str, Grade]] = {}
    for grade in _read_lines(folder / GRADES):
        found.setdefault((grade.model, grade.prompt), {})[grade.id] = grade
    return found


def _read_lines(path: Path) -> Iterator[Grade]:
    if not path.is_file():
        return
    *whole, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole):
        try:
            yield Grade(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise OneLLMError(
                f"{path}: line {number + 1} is not a grade: {error}",
                "a score would rest on it.",
                "remove the line: its answer is graded again.",
            ) from error


class GradeWriter:
    """Appends grades.

    Args:
        folder: the task's folder.
    """

    def __init__(self, folder: Path) -> None:
        repair_last_line(folder / GRADES)
        self._file = (folder / GRADES).open("ab")

    def __enter__(self) -> GradeWriter:
        """Enter the context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def write(self, grade: Grade) -> None:
        """Append a grade, and wait until it is on the disk."""
        self._file.write((json.dumps(asdict(grade), ensure_ascii=True) + "\n").encode("ascii"))
        self._file.flush()
        os.fsync(self._file.fileno())


def measure_grades(
    grading: Grading, folder: Path, answers: Sequence[GivenAnswer]
) -> tuple[list[Measure], Mapping[str, str]]:
    """The scores of every model that graded all answers, and why there is none.

    GPT-4 gives the measure its name in the paper; another one gives it its
    own, because scores of different models cannot be compared. Where several
    versions of GPT-4 graded, each adds its name to the paper's.

    Args:
        grading: how the task is graded.
        folder: the task's folder.
        answers: the answers that are scored.
    """
    grades = read_grades(folder)
    models = dict.fromkeys(model for model, _ in grades)
    digests = {a.question.id: digest_prompt(grading.build(a)) for a in answers}
    graded, lacking = dict[str, dict[str, float]](), []
    for model in models:
        own = {
            name: grades[model, digest][name].value
            for name, digest in digests.items()
            if name in grades.get((model, digest), {})
        }
        if len(own) < len(answers):
            lacking.append(f"{model} graded {len(own):,} of {len(answers):,} answers")
            continue
        graded[model] = own
    papers = [model for model in graded if _GPT4.fullmatch(model)]
    measures = []
    for model, own in graded.items():
        name = f"{grading.unit} by {model}"
        if model in papers:
            name = grading.measure + (f" ({model})" if len(papers) > 1 else "")
        measures.append(Measure.from_values(name, own, collect_labels(answers), graded=True))
    why = (
        "; ".join(lacking) or "another model scores: onellm score --grader URL --grader-model NAME"
    )
    return measures, {} if papers else {grading.measure: why}
