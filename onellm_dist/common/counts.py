"""Counts with their nouns, for messages and pages."""

from __future__ import annotations


def format_count(number: int, one: str, many: str | None = None) -> str:
    """`1 step`, `2 steps`; `many` is the plural where it is more than an added s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
