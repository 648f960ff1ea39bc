"""MME's answer files: one a task, for its calculation.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.scorers.mme import flatten


def write_lists(answers: Sequence[GivenAnswer]) -> Mapping[str, bytes]:
    """Lines `picture<TAB>question<TAB>answer<TAB>prediction`, the two of a picture together."""
    lines: dict[str, dict[str, list[str]]] = {}
    for answer in answers:
        question = answer.question
        fields = (
            f"{question.extra['file']}.jpg",
            question.text,
            question.answers[0] if question.answers else "",
            answer.text,
        )
        line = "\t".join(map(flatten, fields))
        pictures = lines.setdefault(question.labels["task"], {})
        pictures.setdefault(question.medium, []).append(line)
    return {
        f"{task}.txt": "".join(f"{line}\n" for pair in pictures.values() for line in pair).encode(
            "utf-8", "replace"
        )
        for task, pictures in lines.items()
    }


def check_lists(name: str, content: bytes) -> Sequence[str]:
    """Check four fields a line, and pairs of lines about one picture."""
    rows = [line.split("\t") for line in content.decode("utf-8").splitlines()]
    wrong = [i for i, row in enumerate(rows) if len(row) != 4]
    if wrong:
        return [f"line {i + 1} has {len(rows[i])} fields, not 4" for i in wrong]
    pairs = [
        f"lines {i + 1} and {i + 2} are about {rows[i][0]} and {rows[i + 1][0]}"
        for i in range(0, len(rows) - 1, 2)
        if rows[i][0] != rows[i + 1][0]
    ]
    return pairs + (["the number of lines is odd"] if len(rows) % 2 else [])
