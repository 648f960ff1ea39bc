"""The text of an error for one line of a table."""

from __future__ import annotations

LONGEST = 200


def get_first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if it has none."""
    lines = str(error).splitlines()
    return (lines[0][:LONGEST] if lines else "") or type(error).__name__
