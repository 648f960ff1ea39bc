"""Files of answers in the forms that benchmark servers take, and their rules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.tasks.base import AnswerFiles, FormatCheck


def make_list_file(name: str, **fields: str) -> AnswerFiles:
    """A JSON list of objects.

    Args:
        name: of the file.
        fields: key of the object -> key of `extra`, or `answer` for the answer.
    """

    def write(answers: Sequence[GivenAnswer]) -> Mapping[str, bytes]:
        rows = [
            {
                key: a.text if source == "answer" else a.question.extra[source]
                for key, source in fields.items()
            }
            for a in answers
        ]
        return {name: encode_json(rows)}

    return write


def encode_json(value: Any) -> bytes:
    """JSON as UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def make_list_check(**types: type) -> FormatCheck:
    """Check a JSON list of objects with exactly these keys, each of a type, the first unique.

    Args:
        types: key -> type of its value.
    """

    def check(name: str, content: bytes) -> Sequence[str]:
        try:
            rows = json.loads(content)
        except ValueError as error:
            return [f"{name} is not JSON: {error}"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return [f"{name} is not a list of objects"]
        problems = []
        key = next(iter(types))
        seen = set()
        for number, row in enumerate(rows):
            if set(row) != set(types):
                problems.append(f"entry {number} has the keys {sorted(row)}, not {sorted(types)}")
                continue
            wrong = [k for k, kind in types.items() if type(row[k]) is not kind]
            if wrong:
                problems.append(f"entry {number}: {', '.join(wrong)} has another type")
            if repr(row[key]) in seen:
                problems.append(f"entry {number} repeats {key} {row[key]!r}")
            seen.add(repr(row[key]))
        return problems

    return check


def make_map_file(name: str, key: str) -> AnswerFiles:
    """A JSON object from an id to the answer.

    Args:
        name: of the file.
        key: of `extra`, which has the id.
    """

    def write(answers: Sequence[GivenAnswer]) -> Mapping[str, bytes]:
        return {name: encode_json({str(a.question.extra[key]): a.text for a in answers})}

    return write


def check_map(name: str, content: bytes) -> Sequence[str]:
    """Check a JSON object of texts."""
    try:
        rows = json.loads(content)
    except ValueError as error:
        return [f"{name} is not JSON: {error}"]
    if not isinstance(rows, dict) or not all(isinstance(v, str) for v in rows.values()):
        return [f"{name} is not an object of texts"]
    return []
