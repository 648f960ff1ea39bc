"""Values of a recipe, given the types of its keys: text stays as it was typed, the rest is YAML."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from onellm_dist.config.schema import RunConfig
from onellm_dist.config.section import Section
from onellm_dist.config.yaml_text import Plain, parse_yaml

QUOTES = ("'", '"')


def resolve(raw: Any, annotation: Any = RunConfig) -> Any:
    """Replace each `Plain` by its text or by its value, as the key wants it.

    One that has two meanings stays where any value is wanted: `list_ambiguous` finds it.

    Args:
        raw: what `parse_yaml` gave.
        annotation: the type of the key; default: a whole recipe.
    """
    if isinstance(raw, Plain):
        return _resolve_plain(raw, annotation)
    if isinstance(raw, dict):
        fields = get_fields(annotation)
        item = _find_item_type(annotation, dict)
        return {name: resolve(value, fields.get(name, item)) for name, value in raw.items()}
    if isinstance(raw, list):
        types = [_find_item_type(annotation, tuple, i) for i in range(len(raw))]
        return [resolve(value, kind) for value, kind in zip(raw, types, strict=True)]
    return raw


def list_ambiguous(value: Any, key: str = "") -> list[str]:
    """A problem for each `yes`, `no`, `on` and `off` whose key takes any value.

    Args:
        value: what `resolve` gave.
        key: where it stands.
    """
    if isinstance(value, Plain):
        return [
            f"{key}: {value.text} is a truth value to some readers of YAML and a text to others; "
            f"write true or false, or '{value.text}' in quotes"
        ]
    if isinstance(value, dict):
        items = [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{key}[{number}]", item) for number, item in enumerate(value)]
    else:
        return []
    return [problem for name, item in items for problem in list_ambiguous(item, name)]


def parse_override(text: str, annotation: Any) -> Any:
    """The value of `key=TEXT`: for a key that takes text, all of TEXT; else YAML.

    For a key that takes any value, TEXT is YAML where it begins like a list, a mapping or a quoted
    text; else all of it is one scalar, also with `#` or `: ` in it.

    Args:
        text: what stands behind the equals sign.
        annotation: the type of the key.

    Raises:
        yaml.YAMLError: it is not YAML, and the key does not take text.
    """
    if _takes_text(annotation) and not _takes_a_list(annotation):
        if len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES:
            return yaml.safe_load(text)
        return Plain(text)
    if not text or (annotation is Any and not text.lstrip().startswith((*QUOTES, "[", "{"))):
        return Plain(text.strip())
    return parse_yaml(text)


def get_fields(annotation: Any) -> dict[str, Any]:
    """Key -> type, of the section that an annotation is or contains; {} if there is none.

    A field whose key has another name (`get_aliases`) is there under both.
    """
    section = _find_section(annotation)
    if section is None:
        return {}
    return {
        key: _get_annotation(field)
        for name, field in section.model_fields.items()
        for key in (field.alias or name, name)
    }


def get_aliases(annotation: Any) -> dict[str, str]:
    """Field -> key, of the fields whose keys have another name; recipes may use either.

    Args:
        annotation: see `get_fields`.
    """
    section = _find_section(annotation)
    fields = {} if section is None else section.model_fields
    return {name: field.alias for name, field in fields.items() if field.alias is not None}


def _get_annotation(field: Any) -> Any:
    return field.annotation


def _find_section(annotation: Any) -> type[Section] | None:
    # Python 3.10 takes `dict[str, Any]` for a type, but not for a class.
    if (
        isinstance(annotation, type)
        and not get_origin(annotation)
        and issubclass(annotation, Section)
    ):
        return annotation
    if get_origin(annotation) in (Union, UnionType):
        found = (_find_section(choice) for choice in get_args(annotation))
        return next((section for section in found if section is not None), None)
    return None


def _resolve_plain(plain: Plain, annotation: Any) -> Any:
    if annotation is Any:
        return plain if plain.has_two_meanings else plain.free_value
    value = plain.value
    if value is None:
        optional = not _takes_text(annotation) or type(None) in _list_choices(annotation)
        return None if optional or not plain.text else plain.text
    is_wrong_bool = isinstance(value, bool) and bool not in _list_choices(annotation)
    return plain.text if _takes_text(annotation) or is_wrong_bool else value


def _takes_text(annotation: Any) -> bool:
    return bool({str, Path} & set(_list_choices(annotation)))


def _takes_a_list(annotation: Any) -> bool:
    return any(get_origin(choice) in (tuple, dict) for choice in _list_choices(annotation))


def _list_choices(annotation: Any) -> list[Any]:
    """The types that a key may have; a literal text counts as `str`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _list_choices(arguments[0])
    if origin in (Union, UnionType):
        return [choice for argument in arguments for choice in _list_choices(argument)]
    if origin is Literal:
        return [type(choice) for choice in arguments]
    return [annotation]


def _find_item_type(annotation: Any, container: type, index: int = 0) -> Any:
    """The type of the items of a list (of a mapping: of its values); Any if it is not known."""
    for choice in _list_choices(annotation):
        arguments = get_args(choice)
        if get_origin(choice) is not container or not arguments:
            continue
        if container is dict:
            return arguments[1]
        repeated = arguments[1:] == (...,)
        return arguments[0] if repeated else arguments[min(index, len(arguments) - 1)]
    return Any
