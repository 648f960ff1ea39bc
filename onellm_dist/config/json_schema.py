"""The JSON schema of a recipe's file, for editors that complete and check YAML.

pydantic's schema describes values after `config/values.py` has read them. A file may hold more, as
an editor's YAML parser sees it: a dataset named `21` is a number there, and `1_000` and `yes` are
texts. The schema never refuses what the loader accepts; the loader still refuses more (folders that
do not exist, keys that exclude each other). It is written in draft 7, which editors know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onellm_dist.config.keys import BASE_KEY
from onellm_dist.config.recipe_files import BASE
from onellm_dist.config.schema import RunConfig

DRAFT = "http://json-schema.org/draft-07/schema#"
TITLE = "Recipe of onellm_dist"
_DEFINITIONS = "$defs"
_REFERENCE = f"#/{_DEFINITIONS}/"
_EXPONENT = r"[eE][-+]?[0-9]+"
_INTEGER = rf"[0-9][0-9_]*(\.0*|(\.[0-9_]*)?{_EXPONENT})?"
_NUMBER = rf"(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)({_EXPONENT})?"
_TRUE = "[Tt]([Rr][Uu][Ee])?|[Yy]([Ee][Ss])?|[Oo][Nn]|1"
_FALSE = "[Ff]([Aa][Ll][Ss][Ee])?|[Nn][Oo]?|[Oo][Ff][Ff]|0"
_TEXT: dict[str, Any] = {"type": ["string", "number", "boolean", "null"]}
"""A text without quotes may be anything to YAML: a folder `22.05`, a dataset `on`, or `~`."""
_LIMITS = ("minimum", "exclusiveMinimum")


def build_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe's file."""
    found = RunConfig.model_json_schema(by_alias=True)
    definitions = found.pop(_DEFINITIONS)
    root = _adapt(found)
    base = {**_TEXT, "description": BASE_KEY.description, "default": None}
    return {
        "$schema": DRAFT,
        "title": TITLE,
        **{key: value for key, value in root.items() if key not in ("description", "required")},
        "properties": {BASE: base, **root["properties"]},
        # What a recipe with a base leaves out, the base has.
        "if": {"required": [BASE]},
        "then": {},
        "else": _collect_required(found, definitions),
        _DEFINITIONS: {
            name: _adapt(definition, keep_required=name in _find_listed(definitions))
            for name, definition in definitions.items()
        },
    }


def _adapt(schema: Mapping[str, Any], *, keep_required: bool = False) -> dict[str, Any]:
    """Let a schema accept what the loader reads as the values that it describes."""
    kept = {
        key: value
        for key, value in schema.items()
        if key not in ("title", "format") and (key != "required" or keep_required)
    }
    if "description" in kept:
        kept["description"] = " ".join(kept["description"].split())
    if "properties" in kept:
        kept["properties"] = {name: _adapt(s) for name, s in kept["properties"].items()}
    if isinstance(kept.get("additionalProperties"), dict):
        kept["additionalProperties"] = _adapt(kept["additionalProperties"])
    if "anyOf" in kept:
        return _join(kept, [_adapt(choice) for choice in kept.pop("anyOf")])
    if "prefixItems" in kept:  # of draft 2020-12
        kept["items"] = _unite([_adapt(item) for item in kept.pop("prefixItems")])
    elif "items" in kept:
        kept["items"] = _adapt(kept["items"])
    if "enum" in kept or "const" in kept:
        kept.pop("type", None)
        return kept
    return kept | _describe_scalar(kept)


def _describe_scalar(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that replace those of a number, truth value or text; {} for anything else."""
    kind = schema.get("type")
    if kind == "string":
        return _TEXT
    if kind == "boolean":
        return {
            "type": ["boolean", "string", "integer"],
            "minimum": 0,
            "maximum": 1,
            "pattern": f"^({_TRUE}|{_FALSE})$",
            "patternErrorMessage": "Write true or false.",
        }
    if kind not in ("integer", "number"):
        return {}
    is_positive = any(schema.get(limit, -1) >= 0 for limit in _LIMITS)
    sign, digits = "+" if is_positive else "-+", _INTEGER if kind == "integer" else _NUMBER
    article = "an" if kind == "integer" else "a"
    return {
        "type": [kind, "string"],
        "pattern": rf"^\s*[{sign}]?({digits})\s*$",
        "patternErrorMessage": f"Write {article} {kind}.",
    }


def _join(schema: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    """A schema with alternatives: one list of types where that says the same."""
    united = _unite([choice for choice in choices if choice != {"type": "null"}])
    if {"type": "null"} not in choices:
        return schema | united
    if "enum" in united:
        return schema | united | {"enum": [*united["enum"], None]}
    if isinstance(kinds := united.get("type"), list):
        return schema | united | {"type": [*dict.fromkeys([*kinds, "null"])]}
    return schema | {"anyOf": [*united.get("anyOf", [united]), {"type": "null"}]}


def _unite(choices: list[dict[str, Any]]) -> dict[str, Any]:
    different = [choice for n, choice in enumerate(choices) if choice not in choices[:n]]
    return different[0] if len(different) == 1 else {"anyOf": different}


def _collect_required(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a recipe without a base must have, section by section."""
    sections = {
        name: _collect_required(definitions[target], definitions)
        for name, inner in schema.get("properties", {}).items()
        if (target := _find_target(inner)) is not None
    }
    found: dict[str, Any] = {}
    if schema.get("required"):
        found["required"] = schema["required"]
    if sections := {name: inner for name, inner in sections.items() if inner}:
        found["properties"] = sections
    return found


def _find_target(schema: Mapping[str, Any]) -> str | None:
    """The definition that a schema or one of its alternatives refers to."""
    for choice in (schema, *schema.get("anyOf", ())):
        if "$ref" in choice:
            return str(choice["$ref"]).removeprefix(_REFERENCE)
    return None


def _find_listed(definitions: Mapping[str, Any]) -> set[str]:
    """The definitions of the items of lists. They are complete, as lists do not merge."""
    return {
        target
        for definition in definitions.values()
        for inner in definition.get("properties", {}).values()
        if (target := _find_target(inner.get("items", {}))) is not None
    }
