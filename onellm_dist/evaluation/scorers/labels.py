"""The categories of answers, table by table."""

from __future__ import annotations

from collections.abc import Sequence

from onellm_dist.evaluation.questions import GivenAnswer

NO_CATEGORY = "(none)"


def collect_labels(answers: Sequence[GivenAnswer]) -> dict[str, list[str]]:
    """Table of the report -> the category of each answer, in order."""
    tables = dict.fromkeys(table for a in answers for table in a.question.labels)
    return {table: [a.question.labels.get(table, NO_CATEGORY) for a in answers] for table in tables}
