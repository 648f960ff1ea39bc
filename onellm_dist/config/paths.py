"""Paths and locations in a recipe: `~` and environment variables are expanded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

MOST_PATH, MOST_NAME = 4000, 255
"""Bytes that a path, and each name in it, may have: on Linux 4096, some for names below it."""
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z_0-9]*))")


def expand_variables(text: str) -> str:
    """Replace `${NAME}`, and `$NAME` where it is set, by environment variables.

    Raises:
        ValueError: a variable in braces is not set.
    """

    def get(found: re.Match[str]) -> str:
        braced, bare = found.groups()
        if braced is None:
            return os.environ.get(bare, found.group())
        if braced not in os.environ:
            raise ValueError(f"the environment variable {braced} is not set")
        return os.environ[braced]

    return _VARIABLE.sub(get, text)


def expand_path(text: str) -> Path:
    """Expand `~` and environment variables in a path.

    Raises:
        ValueError: a variable in braces is not set, or the result cannot be a path.
    """
    text = expand_variables(text)
    if not text.strip():
        raise ValueError("an empty path")
    if "\0" in text:
        raise ValueError("a path with a NUL")
    try:
        expanded = Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:
        raise ValueError(f"{Path(text).parts[0]} is not a user with a home directory") from None
    if not _can_be_a_path(expanded):
        raise ValueError("longer than a path or a name can be, or not text")
    return expanded


def _to_path(value: Any) -> Any:
    return expand_path(str(value)) if isinstance(value, (str, Path)) else value


def _can_be_a_path(path: Path) -> bool:
    try:
        names = [os.fsencode(name) for name in path.parts]
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return (
        sum(map(len, names)) + len(names) < MOST_PATH
        and max(map(len, names), default=0) <= MOST_NAME
    )


def _to_location(value: Any) -> Any:
    if isinstance(value, str) and "://" in value:
        return expand_variables(value)
    return _to_path(value)


LocalPath = Annotated[Path, BeforeValidator(_to_path)]
"""A local path; `~` and environment variables are expanded."""
Location = Annotated[Path | str, BeforeValidator(_to_location)]
"""A local path, or a URL that fsspec can read (`s3://bucket/folder`), which is kept as written."""
