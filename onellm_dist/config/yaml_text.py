"""YAML as recipes use it: a repeated key is refused, and every plain scalar keeps its text.

YAML alone does not know what a key wants: it reads `22_05` as a number, `on` as true and `1:30` as
90. A plain scalar stays a `Plain` here, until the schema has said what the key takes
(config/values.py). `dump_yaml` writes what `parse_yaml` reads as the same values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

MOST_VALUES = 100_000
MOST_LEVELS = 50
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]{0,999}")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_FREE_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,999})")
_FREE_NUMBER = re.compile(
    r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]{1,3}[eE][-+]?[0-9]{1,2}"
)
"""An exponent without a point is short: `8e42137` is a commit, as are all of seven characters."""
_FREE_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_FREE_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
}
_TWO_MEANINGS = ("yes", "no", "on", "off")
MERGE = "tag:yaml.org,2002:merge"
"""The tag of the key `<<`."""
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
    """The scalar as it was typed."""

    @property
    def value(self) -> bool | int | float | str | None:
        """The truth value or number that the scalar stands for; the text where it is neither."""
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

    @property
    def free_value(self) -> bool | int | float | str | None:
        """The scalar's value where a key takes any type: YAML 1.2, but only what loses nothing.

        `007`, `1_000`, `0o17`, `12:30:00` and `8e42137` are texts.
        """
        if self.text in _FREE_CONSTANTS:
            return _FREE_CONSTANTS[self.text]
        if _FREE_INTEGER.fullmatch(self.text):
            return int(self.text)
        if _FREE_SPECIAL.fullmatch(self.text):
            return float(self.text.replace(".", ""))
        if _FREE_NUMBER.fullmatch(self.text) and math.isfinite(number := float(self.text)):
            return number
        return self.text

    @property
    def has_two_meanings(self) -> bool:
        """Whether the scalar is a truth value in YAML 1.1, and a text in YAML 1.2."""
        return self.text.lower() in _TWO_MEANINGS


class _Loader(yaml.SafeLoader):
    """Builds mappings, lists, quoted texts and `Plain`."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise _make_depth_error()
        node: yaml.Node | None = super().compose_node(parent, index)
        self.levels -= 1
        return node

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


def _make_depth_error() -> yaml.YAMLError:
    return yaml.YAMLError(f"values lie in more than {MOST_LEVELS} others")


def _construct_scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    return Plain(node.value) if node.style is None else node.value


def _construct_map(loader: _Loader, node: yaml.MappingNode) -> Any:
    return loader.construct_mapping(node, deep=True)


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    raise _make_error(
        f"!!{node.tag.rpartition(':')[2]} is not a kind of value that a recipe has "
        "(text, number, list, mapping)",
        node,
    )


for _tag in ("set", "omap", "pairs", "binary"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _refuse_tag)
for _tag in ("null", "bool", "int", "float", "timestamp", "str", "value", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_scalar)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)


def parse_yaml(text: str) -> Any:
    """Mappings, lists, texts that were quoted, and `Plain` scalars; None for an empty text.

    Raises:
        yaml.YAMLError: it is not YAML, a key is there twice, or it is larger or deeper than any
            recipe (aliases of aliases make few lines large).
    """
    value = yaml.load(text, Loader=_Loader)
    left = MOST_VALUES
    waiting = [(value, 0)]
    while waiting:
        inner, level = waiting.pop()
        left -= 1
        if left < 0:
            raise yaml.YAMLError(f"there are more than {MOST_VALUES} values")
        if level > MOST_LEVELS:  # through an alias of what it is in
            raise _make_depth_error()
        if isinstance(inner, dict | list):
            members = inner.values() if isinstance(inner, dict) else inner
            waiting += [(member, level + 1) for member in members]
    return value


def find_key_line(text: str, names: Sequence[str]) -> int | None:
    """Return the line of a key in mappings of mappings; the first line is 1.

    Args:
        text: what `parse_yaml` has read.
        names: the keys that lead to it, and its own.

    Returns:
        None if there is no such key.
    """
    node, line = _compose(text), None
    for name in names:
        pair = _find_pair(node, name)
        if pair is None:
            return None
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


@lru_cache(maxsize=16)
def _compose(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=_Loader)


def _find_pair(node: yaml.Node | None, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Find a key of a mapping with its value, else in the mappings that are merged into it."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == name:
            return key, value
    for key, value in pairs:
        if key.tag == MERGE:
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            found = (_find_pair(inner, name) for inner in merged if inner is not node)
            return next((pair for pair in found if pair is not None), None)
    return None


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that would be read as something else without them."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = Plain(text)
    is_text = plain.value == plain.free_value == text and not plain.has_two_meanings
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_text else "'")


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """Write mappings, lists, texts, numbers, truth values and null as YAML."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def dump_inline(value: Any) -> str:
    """Write a value as YAML on one line: `[a, {b: 1}]`."""
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=math.inf
    )
    return text.removesuffix("\n").removesuffix("\n...")
