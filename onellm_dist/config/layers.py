"""The values of a recipe in layers: those of its bases, its own, and those of the command line.

A later layer wins. Sections merge key by key; every other value, a list or the options of an
optimizer included, replaces the earlier one as a whole. A key with two names (`track.with` is
`track.trackers`, too) is one key; a file that has both is left as it is, to be refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.config.recipe_files import BASE, RecipeFile
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.values import get_aliases, get_fields, parse_override, resolve

COMMAND_LINE = "command line"
ALTERNATIVES = {"model": ("path", "preset"), "train": ("steps", "epochs")}
"""Section to two keys that replace each other: a model has one source, a run one length."""
ONE_LAYER = ("train",)
"""Sections of which two such keys on one command line are refused, as in one file. Of the others
the last one counts."""


class _Origin(NamedTuple):
    """What set a value."""

    file: RecipeFile | None
    """None: the command line."""
    key: str
    """The key at which it stands."""

    def __str__(self) -> str:
        return COMMAND_LINE if self.file is None else self.file.describe_place(self.key)


class LayeredRecipe:
    """The values of a recipe, not validated yet, and where each comes from.

    Args:
        files: the recipe, then its base, then the base of that.
        overrides: `key=value`, see `put_override`.

    Raises:
        UsageError: an override does not name a key.
    """

    def __init__(self, files: Sequence[RecipeFile], overrides: Sequence[str] = ()) -> None:
        self.values: dict[str, Any] = {}
        self.files = tuple(files)
        self._origins: dict[str, _Origin] = {}
        self._typed: dict[str, dict[str, Any]] = {}
        """Section of `ONE_LAYER` to what overrides set in it."""
        for file in reversed(files):
            self._put(self.values, file.values, RunConfig, "", file)
            for section in ALTERNATIVES:
                self._replace_alternative(section, file.values.get(section), file)
        for item in overrides:
            self.put_override(item)

    def put_override(self, item: str) -> None:
        """Apply `key=value`; its value replaces the earlier one, also that of a section.

        Raises:
            UsageError: it does not name a key, or its value is not YAML.
        """
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise UsageError(
                f"{item!r} is not key=value",
                "an override names one key of the recipe.",
                "write it like train.steps=10.",
            )
        if key == BASE:
            raise UsageError(
                f"{item!r}: {BASE} stands in a recipe's file alone",
                "an override changes one value of the recipe that is given.",
                f"write {BASE} at the top of a recipe of your own, and train that one.",
            )
        *sections, leaf = key.split(".")
        node, annotation, prefix = self._enter(sections, item)
        leaf = get_aliases(annotation).get(leaf, leaf)
        try:
            kind = get_fields(annotation).get(leaf, Any)
            value = resolve(parse_override(text, kind), kind)
        except yaml.YAMLError as error:
            raise UsageError(
                f"{item!r}: the value is not YAML: {error}",
                "it cannot be read.",
                "quote it for your shell.",
            ) from None
        node.pop(leaf, None)
        self._forget(f"{prefix}{leaf}")
        self._put(node, {leaf: value}, annotation, prefix, None)
        if len(sections) == 1 and sections[0] in ALTERNATIVES:
            given = {leaf: value}
            if sections[0] in ONE_LAYER:
                given = self._typed.setdefault(sections[0], {})
                given[leaf] = value
            self._replace_alternative(sections[0], given, None)

    def describe_origin(self, key: str) -> str | None:
        """Return where the value of a key comes from: `my_recipe.yaml:12`, `command line`.

        Args:
            key: the key as an override names it. If parts of its value were set one by one, all
                their places are named.

        Returns:
            None if nothing set it: it has its default.
        """
        found = [name for name in self._origins if name == key or name.startswith(f"{key}.")]
        places = dict.fromkeys(str(self._origins[name]) for name in found)
        return ", ".join(places) or None

    def describe_base_origin(self, location: Sequence[str]) -> str:
        """Return `" (in BASE:LINE)"` for a value that a base of the recipe set; else "".

        Args:
            location: the parts of its key; those below the key may follow.
        """
        for end in range(len(location), 0, -1):
            key = ".".join(location[:end])
            if key in self._origins:
                origin = self._origins[key]
                is_of_base = origin.file not in (None, self.files[0])
                return f" (in {origin})" if is_of_base else ""
        return ""

    def _enter(self, sections: Sequence[str], item: str) -> tuple[dict[str, Any], Any, str]:
        """Return the values of a section, its type, and what its keys begin with (`train.`).

        Sections that are not there are made.
        """
        node: Any = self.values
        annotation: Any = RunConfig
        prefix = ""
        for given in sections:
            name = get_aliases(annotation).get(given, given)
            prefix += f"{name}."
            node = node.setdefault(name, {})
            annotation = get_fields(annotation).get(name, Any)
            if not isinstance(node, dict):
                raise UsageError(
                    f"{item!r}: {given} is not a section",
                    "there are no keys below it.",
                    "see launch/recipes/ for the keys.",
                )
        return node, annotation, prefix

    def _put(
        self,
        node: dict[str, Any],
        values: Mapping[str, Any],
        annotation: Any,
        prefix: str,
        file: RecipeFile | None,
    ) -> None:
        fields, aliases = get_fields(annotation), get_aliases(annotation)
        for field, alias in aliases.items():
            if not {field, alias}.isdisjoint(values):  # also where an earlier layer has both
                node.pop(field, None)
                self._forget(f"{prefix}{field}")
        for written, value in values.items():
            name = aliases.get(written, written)
            if name != written and name in values:
                name = written
            key, kind = f"{prefix}{name}", fields.get(name, Any)
            if isinstance(value, dict) and get_fields(kind):
                if not isinstance(node.get(name), dict):
                    self._forget(key)
                    node[name] = {}
                self._put(node[name], value, kind, f"{key}.", file)
            else:
                self._forget(key)
                node[name] = value
                self._origins[key] = _Origin(file, f"{prefix}{written}")

    def _forget(self, key: str) -> None:
        """Forget where a key, and all below it, came from."""
        for name in [n for n in self._origins if n == key or n.startswith(f"{key}.")]:
            del self._origins[name]

    def _replace_alternative(self, section: str, given: Any, file: RecipeFile | None) -> None:
        """Let `model.path` of a later layer replace `model.preset` of an earlier one, and so on."""
        node = self.values.get(section)
        if not isinstance(given, Mapping) or not isinstance(node, dict):
            return
        first, second = ALTERNATIVES[section]
        for name, other in ((first, second), (second, first)):
            is_replaced = given.get(name) is not None and other not in given
            if is_replaced and node.get(other) is not None:
                node[other] = None
                self._origins[f"{section}.{other}"] = _Origin(file, f"{section}.{name}")
