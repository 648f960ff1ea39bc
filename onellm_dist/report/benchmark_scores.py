"""The scores of a run's checkpoints on benchmarks, step by step (`data.validation.tasks`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onellm_dist.common.html.page import build_html_table
from onellm_dist.report.entries import Entry


def draw_benchmarks(lines: Sequence[Entry]) -> Iterator[str]:
    """A table with a row for each checkpoint and a column for each score; nothing without scores.

    Args:
        lines: lines of `validation.jsonl`.
    """
    rows: dict[int, dict[str, str]] = {}
    names: dict[int, Any] = {}
    for line in lines:
        scores = dict(_list_scores(line))
        if scores:
            done, name = int(line["steps_done"]), line.get("checkpoint")
            # A later line has tasks that were added, or is of a checkpoint in the same one's place.
            rows[done] = (rows[done] | scores) if names.get(done, ...) == name else scores
            names[done] = name
    columns = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    if columns:
        yield "<h2>Benchmarks</h2>"
        cells = (
            [f"{done:,}", *(scores.get(name, "") for name in columns)]
            for done, scores in sorted(rows.items())
        )
        right = range(len(columns) + 1)
        yield build_html_table(["steps done", *columns], cells, right=right)
        yield '<p class="small">Scores of checkpoints that are kept, with 95% intervals.</p>'


def _list_scores(line: Entry) -> Iterator[tuple[str, str]]:
    """Task and measure, and the score with its interval, of what has the right form."""
    tasks = line.get("tasks")
    if not isinstance(tasks, Mapping):
        return
    for task, measures in tasks.items():
        mark = _describe_part(line.get("incomplete"), task)
        for measure, found in measures.items() if isinstance(measures, Mapping) else ():
            numbers = [
                found.get(key) if isinstance(found, Mapping) else None
                for key in ("value", "low", "high")
            ]
            if all(isinstance(number, int | float) for number in numbers):
                value, low, high = numbers
                yield f"{task}: {measure}", f"{value:.1f} [{low:.1f}, {high:.1f}]{mark}"


def _describe_part(incomplete: Any, task: str) -> str:
    """Which part of a task's questions was answered; "" if all were."""
    part = incomplete.get(task) if isinstance(incomplete, Mapping) else None
    if not isinstance(part, Mapping):
        return ""
    answered, whole = part.get("answered"), part.get("of")
    if isinstance(answered, int) and isinstance(whole, int):
        return f" (incomplete: {answered:,} of {whole:,})"
    return " (incomplete)"
