"""YAML as recipes use it: a repeated key is refused, and every plain scalar keeps its text.

YAML alone does not know what a key wants: it reads `22_05` as a number, `on` as true and `1:30` as
90. A plain scalar stays a `Plain` here, until the schema has said whether the key takes text
(config/values.py).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": float("inf"), ".nan": float("nan")}
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("null", "~", ""), None),
}


@dataclass(frozen=True)
class Plain:
    """A scalar without quotes."""

    text: str
    """As it was typed."""

    @property
    def value(self) -> bool | int | float | str | None:
        """The truth value, number or null that the text stands for; else the text."""
        lower = self.text.lower()
        if lower in _CONSTANTS:
            return _CONSTANTS[lower]
        if _INTEGER.fullmatch(self.text):
            return int(self.text.replace("_", ""))
        if _NUMBER.fullmatch(self.text):
            return float(self.text.replace("_", ""))
        unsigned = lower.lstrip("+-")
        if unsigned in _SPECIAL and len(lower) - len(unsigned) <= 1:
            return -_SPECIAL[unsigned] if lower.startswith("-") else _SPECIAL[unsigned]
        return self.text


class _Loader(yaml.SafeLoader):
    """Builds mappings, lists, quoted texts and `Plain`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        known = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _make_error("a key is not a text", key)
            if key.value in known:
                raise _make_error(f"the key {key.value} is there twice", key)
            known.add(key.value)
        self.flatten_mapping(node)  # `<<: *anchor`: a key of the mapping itself wins
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _make_error(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _construct_scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    return Plain(node.value) if node.style is None else node.value


def _construct_map(loader: _Loader, node: yaml.MappingNode) -> Any:
    return loader.construct_mapping(node, deep=True)


for _tag in ("null", "bool", "int", "float", "timestamp", "str"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_scalar)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)


def parse_yaml(text: str) -> Any:
    """Mappings, lists, texts that were quoted, and `Plain` scalars; None for an empty text.

    Raises:
        yaml.YAMLError: it is not YAML, or a key is there twice.
    """
    return yaml.load(text, Loader=_Loader)
