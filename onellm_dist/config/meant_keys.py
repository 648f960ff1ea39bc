"""Which keys of a recipe an unknown key may stand for: it is misspelled, misplaced or of 0.1.0."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from onellm_dist.config.keys import describe_keys, find_section
from onellm_dist.config.old_keys import find_new_name
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.values import get_aliases, get_fields

SIMILAR, NEARLY_EQUAL = 0.5, 0.8
"""Similarity (difflib's ratio) of an unknown key to one of its own section: it may stand for that
one; it does so rather than for a key of that very name elsewhere, or of which it has a value."""
ITEM = "[]"
"""Stands behind the name of a list of sections, in the names of their keys."""


def suggest_keys(section: Sequence[str], key: str, value: Any) -> list[str]:
    """Return the keys that an unknown key most likely stands for; none if it is like none.

    Args:
        section: the names of the section and of those around it.
        key: the unknown key.
        value: its value.
    """
    renamed = find_new_name(".".join([*section, key]))
    if renamed is not None:
        return [renamed]
    near = _find_similar(section, key, NEARLY_EQUAL)[:1]
    misplaced, chosen = _find_misplaced(key), _find_chosen(value)
    sure = next((names for names in (near, misplaced, chosen) if len(names) == 1), None)
    return sure or misplaced or _find_similar(section, key, SIMILAR)[:1]


def list_missing_keys(raw: Mapping[str, Any]) -> set[str]:
    """Return the keys, such as `train.steps`, whose values an unknown key may hold.

    Args:
        raw: a recipe's values, not validated.

    Returns:
        Sections and the keys of these, as recipes spell them; of what lies deeper, the key of the
        section in which it lies.
    """
    meant = {
        name
        for section, key, value in _list_unknown(raw)
        for name in _list_meant(raw, section, key, value)
    }
    return {".".join(name.replace(ITEM, "").split(".")[:2]) for name in meant}


def _list_meant(
    raw: Mapping[str, Any], section: Sequence[str], key: str, value: Any
) -> Iterator[str]:
    """All keys that an unknown key may stand for, `suggest_keys` included."""
    renamed = find_new_name(".".join([*section, key]))
    if renamed is not None:
        yield renamed
        return
    if len(section) < 2:  # deeper, it makes what it lies in invalid
        yield from _find_similar(section, key, SIMILAR)
    for name in _find_misplaced(key):
        parent, is_item, _ = name.partition(ITEM)
        if not is_item or not _is_given(raw, parent):
            yield name
    paths = _find_paths(section) if isinstance(value, str) and len(section) == 1 else []
    yield from (name for name in (*_find_chosen(value), *paths) if not _is_given(raw, name))
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _list_meant(raw, [*section, key], str(inner), item)


def _list_unknown(raw: Mapping[str, Any]) -> list[tuple[list[str], str, Any]]:
    """Section, name and value of each unknown key, sections within sections included."""
    try:
        RunConfig.model_validate(raw)
    except ValidationError as error:
        found = [each for each in error.errors() if each["type"] == "extra_forbidden"]
        paths = [[str(part) for part in each["loc"]] for each in found]
        return [
            (path[:-1], path[-1], each["input"]) for path, each in zip(paths, found, strict=True)
        ]
    return []


def _find_similar(section: Sequence[str], key: str, cutoff: float) -> list[str]:
    """The keys of the section itself that are similar, the nearest first."""
    found = find_section(list(section))
    aliases = get_aliases(found)
    near = difflib.get_close_matches(key, get_fields(found), cutoff=cutoff)
    return [".".join([*section, aliases.get(name) or name]) for name in near]


def _find_misplaced(key: str) -> list[str]:
    """The sections and keys of this name anywhere: `precision` or `train.precision`."""
    names = (*RunConfig.model_fields, *_list_types())
    return [name for name in names if name == key or name.endswith(f".{key}")]


def _find_chosen(value: Any) -> list[str]:
    """The keys that have `value`, a text, among their few choices."""
    if not isinstance(value, str):
        return []
    return [name for name, kind in _list_types().items() if value in _list_choices(kind)]


def _find_paths(section: Sequence[str]) -> list[str]:
    """The keys of a section whose values are paths."""
    fields = get_fields(find_section(list(section)))
    return [".".join([*section, name]) for name, kind in fields.items() if _is_path(kind)]


def _is_given(raw: Mapping[str, Any], name: str) -> bool:
    value: Any = raw
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


@cache
def _list_types() -> Mapping[str, Any]:
    """The type of each key that lies in a section, by its name: `data.mixture[].path`."""
    found = {}
    for key in describe_keys():
        *section, name = key.name.replace(ITEM, "").split(".")
        if section:
            found[key.name] = get_fields(find_section(section))[name]
    return MappingProxyType(found)


def _list_choices(kind: Any) -> list[Any]:
    """The texts among which a value is chosen, in a type of several."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_origin(kind) is Annotated:
        return _list_choices(get_args(kind)[0])
    return [choice for inner in get_args(kind) for choice in _list_choices(inner)]


def _is_path(kind: Any) -> bool:
    return kind is Path or any(_is_path(inner) for inner in get_args(kind))
