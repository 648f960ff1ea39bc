"""Every key of a recipe as data: for documentation, editors, `--keys` and error messages."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from onellm_dist.common.text_table import format_table
from onellm_dist.config.recipe_files import BASE
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.section import Section
from onellm_dist.config.yaml_text import dump_inline

REQUIRED = "required"
"""Shown in place of a default where a key must be set."""
_TYPE_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    type(None): "null",
    Any: "any value",
}
_LIMITS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
"""Attributes of annotated-types' limits, and the signs that show them."""


class KeyDescription(NamedTuple):
    """One key of a recipe."""

    name: str
    """The key with its sections, as an override names it: `train.steps`, `data.mixture[].path`."""
    type: str
    """What the value may be, in words: `integer > 0`, `align or tune`."""
    default: str
    """The default as YAML, or REQUIRED."""
    description: str
    """What the key does; the field's docstring, on one line."""


BASE_KEY = KeyDescription(
    BASE,
    "name or path",
    "null",
    "The recipe on which this one is built: the name of one that ships, or a path relative to this "
    "file. Sections merge key by key; any other value, lists included, replaces the base's. "
    "Default: the recipe is complete by itself.",
)
"""The key that only a recipe's file has: the loader replaces it by the values of the base."""


def describe_keys() -> list[KeyDescription]:
    """Return every key of a recipe, section by section, in the order of the schema."""
    return [
        BASE_KEY,
        *(
            key
            for name, field in RunConfig.model_fields.items()
            for key in _describe_section(name, _get_section(field.annotation))
        ),
    ]


def format_key_list() -> str:
    """Format every key for a terminal, one line each: key, type, default, what it does."""
    rows = [
        (key.name, key.type, key.default, _get_first_sentence(key.description))
        for key in describe_keys()
    ]
    return "\n".join(format_table(rows))


def find_section(path: list[str]) -> type[Section] | None:
    """Return the section at a path such as `["data", "mixture", "0"]`; None if there is none."""
    section: type[Section] | None = RunConfig
    for part in path:
        if section is None:
            return None
        if part.isdigit():
            continue
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        section = _find_section(fields[part].annotation) if part in fields else None
    return section


def _get_first_sentence(text: str) -> str:
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z`])", text)[0]


def _describe_section(prefix: str, section: type[Section]) -> Iterator[KeyDescription]:
    for name, field in section.model_fields.items():
        key = f"{prefix}.{field.alias or name}"
        text = " ".join((field.description or "").split())
        yield KeyDescription(key, _describe_field(field), _describe_default(field), text)
        nested = _find_section(field.annotation)
        if nested is not None:
            listed = get_origin(field.annotation) is tuple
            yield from _describe_section(f"{key}[]" if listed else key, nested)


def _find_section(annotation: Any) -> type[Section] | None:
    """Return the section class inside an annotation: itself, optional, or the items of a list."""
    if (
        isinstance(annotation, type)
        and not get_origin(annotation)
        and issubclass(annotation, Section)
    ):
        return annotation
    found = (_find_section(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


def _get_section(annotation: Any) -> type[Section]:
    section = _find_section(annotation)
    assert section is not None, annotation
    return section


def _describe_field(field: FieldInfo) -> str:
    first, *others = _describe_type(field.annotation).split(" or ")
    return " or ".join([first + _describe_limits(field.metadata), *others])


def _describe_type(annotation: Any) -> str:
    """Return a type in words."""
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    # In Python 3.10 list[int] is an instance of type.
    if origin is None and isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if origin is Annotated:
        return _describe_type(arguments[0]) + _describe_limits(arguments[1:])
    if origin is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        if set(arguments) == {Path, str}:
            return "path or URL"
        return " or ".join(map(_describe_type, arguments))
    if origin is tuple and arguments[1:] == (...,):
        return f"list of {_describe_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_describe_type, arguments))}]"
    if origin is dict:
        return f"mapping to {_describe_type(arguments[1])}"
    return str(annotation)


def _describe_limits(metadata: Any) -> str:
    """Return the limits of a number in words: ` > 0`."""
    limits: list[str] = []
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            limits += filter(None, [_describe_limits(limit.metadata).strip()])
        limits += [
            f"{sign} {getattr(limit, name)}" for name, sign in _LIMITS if hasattr(limit, name)
        ]
    return f" {' and '.join(limits)}" if limits else ""


def _describe_default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    default = field.get_default(call_default_factory=True)
    plain = list(default) if isinstance(default, tuple) else default
    plain = str(plain) if isinstance(plain, Path) else plain
    return dump_inline(plain)
