"""The text of an error for one line of a message or a table."""

from __future__ import annotations

LONGEST = 200


def get_first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or its class name if it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:LONGEST]
