"""One of something is not called several."""

from __future__ import annotations

import ast
import re

import pytest
from package_code import modules, nodes

from onellm_dist.common.counts import format_count


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ("step",), "0 steps"),
        (1, ("step",), "1 step"),
        (12_000, ("step",), "12,000 steps"),
        (1, ("entry", "entries"), "1 entry"),
        (2, ("entry", "entries"), "2 entries"),
    ],
)
def test_a_count_has_the_noun_in_the_right_number(
    number: int, nouns: tuple[str, ...], text: str
) -> None:
    assert format_count(number, *nouns) == text


@pytest.mark.seconds
def test_plurals_are_made_in_one_place() -> None:
    """No text adds an s by itself, as in `rank{'s' if count > 1 else ''}`, where a count is."""
    alone = {
        name
        for name in modules()
        for node in nodes(name)
        if isinstance(node, ast.JoinedStr)
        and re.search(r"\{[^{}]+\} [\w ]+\{'s' if", ast.unparse(node))
    }
    assert alone == set()
