"""Glob patterns of dotted names that look like one that matches nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

NEAR_NAMES = 3


def find_near_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Patterns that match some of the names and look like `pattern`, the most similar first.

    Args:
        pattern: the pattern.
        names: dotted names; numbers in them are replaced by `*`.
    """
    candidates = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    for name in [*candidates]:
        parts = name.split(".")
        candidates |= dict.fromkeys(".".join([*parts[:end], "*"]) for end in range(1, len(parts)))
    return difflib.get_close_matches(pattern, list(candidates), n=NEAR_NAMES, cutoff=0.5)
