"""Errors in one line."""

from __future__ import annotations

import pytest

from onellm_dist.common.error_text import LONGEST, get_first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("what\nwhy", "what"),
        ("\n  \n  what\nwhy", "what"),
        ("", "ValueError"),
        (" \n", "ValueError"),
        ("x" * 300, "x" * LONGEST),
    ],
)
def test_an_error_is_formatted_in_one_line(message: str, line: str) -> None:
    assert get_first_line(ValueError(message)) == line
