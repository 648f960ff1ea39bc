"""What a recipe with wrong keys says all the same: the sections and values that are valid.

What they name can be looked for before the wrong keys are fixed. Nothing is guessed: a value or
section whose key may be the one that was misspelled, or put into another section, is not taken for
its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from onellm_dist.config.keys import find_section
from onellm_dist.config.meant_keys import list_missing_keys
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.section import Section


class ValidParts(NamedTuple):
    """The valid parts of a recipe."""

    sections: Mapping[str, Section]
    """Section by name, if the section is valid but for unknown keys that are like none of its own,
    and no key of another section is like one of them."""
    values: Mapping[str, Mapping[str, Any]]
    """Section's name to its valid values by field, defaults included; of a list, the valid items.
    """
    shortened: frozenset[str] = frozenset()
    """The lists in `values` that lack items, which are not valid: `train.parameters`."""

    @classmethod
    def from_config(cls, config: RunConfig) -> ValidParts:
        """Return all of a valid recipe."""
        sections = {name: getattr(config, name) for name in RunConfig.model_fields}
        return cls(sections, {name: dict(section) for name, section in sections.items()})


def find_valid_parts(raw: Mapping[str, Any]) -> ValidParts:
    """Return what is valid in a recipe that as a whole is not.

    Args:
        raw: the recipe's values, not validated.
    """
    sections: dict[str, Section] = {}
    values: dict[str, Mapping[str, Any]] = {}
    shortened: list[str] = []
    missing = list_missing_keys(raw)
    for name in RunConfig.model_fields:
        section, given = find_section([name]), raw.get(name, {})
        assert section is not None
        if name in missing or not isinstance(given, Mapping):
            continue
        fields = _map_keys_to_fields(section)
        absent = {field for key, field in fields.items() if f"{name}.{key}" in missing}
        known = {key: value for key, value in given.items() if key in fields}
        if not absent:
            with suppress(ValidationError):
                sections[name] = section.model_validate(known)
                values[name] = dict(sections[name])
                continue
        clear = {fields[key]: value for key, value in known.items() if fields[key] not in absent}
        values[name] = found = _list_valid_values(section, clear, absent)
        lists = (field for field in clear if isinstance(found.get(field), tuple))
        shortened += (f"{name}.{each}" for each in lists if len(found[each]) < len(clear[each]))
    return ValidParts(sections, values, frozenset(shortened))


def _map_keys_to_fields(section: type[Section]) -> dict[str, str]:
    """The field of each key of a section: recipes spell `track.trackers` as `track.with`, too."""
    fields = section.model_fields
    return {key: name for name, field in fields.items() for key in (name, field.alias or name)}


def _list_valid_values(
    section: type[Section], given: Mapping[str, Any], missing: set[str]
) -> dict[str, Any]:
    """The valid values of a section, and the defaults of fields that are not given, by field.

    Args:
        section: the section.
        given: values as the recipe has them, by field.
        missing: fields without a value here, because an unknown key may be theirs.
    """
    values: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if name in given:
            with suppress(ValidationError):
                values[name] = _validate_field(field, given[name])
        elif name not in missing and not field.is_required():
            values[name] = field.get_default(call_default_factory=True)
    return values


def _validate_field(field: FieldInfo, value: Any) -> Any:
    """The value as the section would have it; a list without its wrong items.

    Raises:
        ValidationError: it is wrong, or all of its items are.
    """
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated[(annotation, *field.metadata)]
    annotated: TypeAdapter[Any] = TypeAdapter(annotation)
    items = get_args(field.annotation)
    if get_origin(field.annotation) is not tuple or items[1:] != (...,):
        return annotated.validate_python(value)
    try:
        return annotated.validate_python(value)
    except ValidationError:
        if not isinstance(value, list | tuple):
            raise
        item: TypeAdapter[Any] = TypeAdapter(items[0])
        valid = []
        for each in value:
            with suppress(ValidationError):
                item.validate_python(each)
                valid.append(each)
        return annotated.validate_python(valid)
