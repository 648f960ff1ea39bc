"""Media that a row has where its source does not look, and that would be lost without a word."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from onellm_dist.common.turns import get_part_modality, get_said
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.shards.format.names import get_modality_parts, split_file_name
from onellm_dist.shards.sources.readers.table_columns import NO_VALUE, ROLE_ENDINGS

_ENDINGS = "|".join(ROLE_ENDINGS[1:])
_ALWAYS_FILES = ("image", "video", "audio")
"""A text in their columns is the name of a file, also without an extension."""


def find_unread_column(
    values: Mapping[str, Any],
    read: Collection[str],
    modalities: Collection[str],
    *,
    has_media: bool,
) -> str | None:
    """Find a column that holds media of a row and is not read.

    A row without media has it in any column of content or of a name such as `image_2` or
    `image_path`. Beside media, other columns may say where these came from; only those that are
    numbered, or named as a part of the dataset's samples, hold further ones.

    Args:
        values: column to value.
        read: the columns that are read.
        modalities: those of the dataset; () for texts alone.
        has_media: whether the columns that are read hold a medium in this row.
    """
    pattern = _compile_names(tuple(modalities) if has_media else None)
    for column, value in values.items():
        if column in read:
            continue
        named = pattern.fullmatch(column.lower())
        if named and _names_file(value, always=named["role"] in _ALWAYS_FILES):
            return column
        if (named or not has_media) and _holds_content(value):
            return column
    return None


@cache
def _compile_names(modalities: tuple[str, ...] | None) -> re.Pattern[str]:
    """Names of columns of media: `image`, `images`, `image_2`, `image_2_path`.

    Args:
        modalities: whose; None: all, and with names of files without a number (`image_path`).
    """
    names = all_modalities() if modalities is None else modalities
    roles = {role for name in names for role in get_modality_parts(get_modality(name))}
    role = f"(?P<role>{'|'.join(sorted(roles)) or '(?!)'})(?:s|es)?"
    if modalities is None:
        return re.compile(rf"{role}[_ .-]?\d*(?:{_ENDINGS})?s?[_ .-]?\d*")
    return re.compile(rf"{role}(?:[_ .-]?\d+(?:{_ENDINGS})?)?")


def is_empty(value: Any) -> bool:
    """Check for no value: null, an empty text or list, an object whose values are all empty.

    Tables write a null object as one whose values are null.
    """
    if isinstance(value, Mapping):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (bytes, list)) and not value)


def is_content(value: Any) -> bool:
    """Check for bytes, `{bytes, path}`, or a list with one of them; they may be empty."""
    if isinstance(value, list):
        return any(map(is_content, value))
    return isinstance(value, bytes) or (isinstance(value, Mapping) and "bytes" in value)


def _holds_content(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_content, value))
    return is_content(value) and not is_empty(value)


def _names_file(value: Any, *, always: bool) -> bool:
    if isinstance(value, list):
        return any(_names_file(item, always=always) for item in value)
    if isinstance(value, Mapping):
        return any(_names_file(value.get(key), always=always) for key in ("path", "url"))
    if not isinstance(value, str) or is_empty(value) or value.strip() in NO_VALUE:
        return False
    return always or split_file_name(value.strip()) is not None


def list_media_parts(turns: Any) -> Iterator[tuple[str, Any]]:
    """List the content parts of turns that are media.

    Args:
        turns: a conversation; anything that is not a turn with a list of parts is passed over.

    Yields:
        The part's type, and what it holds; None: its place alone is given.
    """
    for turn in turns if isinstance(turns, list) else ():
        said = get_said(turn) if isinstance(turn, dict) else None
        for part in said if isinstance(said, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                yield kind, get_part_medium(part)


def get_part_medium(part: Mapping[str, Any]) -> Any:
    """Return what a content part holds, under the name of its type, `path` or `url`.

    None: its place alone is given.
    """
    held = (part.get(key) for key in (str(part.get("type")), "path", "url"))
    return next((value for value in held if not is_empty(value)), None)


def list_part_modalities(turns: Any) -> list[str]:
    """List the modalities of the content parts of turns that are media, each once."""
    found = {get_part_modality(kind) for kind, _ in list_media_parts(turns)}
    return sorted(found & all_modalities().keys())
