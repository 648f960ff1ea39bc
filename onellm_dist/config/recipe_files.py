"""The files of a recipe: the recipe itself, and its bases.

`base:` at the top of a recipe names another one, by the name of one that ships or as a path
relative to the file. The recipe holds what differs from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.common.resources import recipes_dir
from onellm_dist.config.paths import expand_path
from onellm_dist.config.values import resolve
from onellm_dist.config.yaml_text import Plain, find_key_line, parse_yaml

BASE = "base"
"""The key that names the recipe on which another is built. It stands in files alone."""
OPTIONAL_PARTS = (("train", "lora"), ("train", "early_stopping"), ("data", "validation"))
"""Parts of a recipe that are off unless they are given."""


@dataclass(frozen=True)
class RecipeFile:
    """What one file of a recipe says."""

    path: Path
    text: str
    values: dict[str, Any]
    """The file's sections without `base`, not validated yet."""
    base: str | None
    """The recipe on which it is built, as written; None if it is complete by itself."""

    def find_line(self, key: str) -> int | None:
        """Return the line of a key such as `train.steps`; None if it is not there."""
        return find_key_line(self.text, key.split("."))

    def describe_place(self, key: str) -> str:
        """Return the file and the line of a key: `my_recipe.yaml:12`."""
        line = self.find_line(key)
        return str(self.path) if line is None else f"{self.path}:{line}"


def find_recipe(recipe: Path | str) -> Path:
    """Return a recipe's file: as given, or by name in `launch/recipes/` (checkout or wheel).

    Raises:
        UsageError: there is no such file and no such name.
    """
    recipe = Path(recipe)
    if os.path.isfile(recipe):  # false, too, for what cannot be a path
        return recipe
    shipped = _find_shipped(recipe)
    if shipped is not None:
        return shipped
    raise UsageError(
        f"no recipe {recipe}",
        "it is neither a file nor a recipe that ships with onellm_dist.",
        f"give a file, or one of: {', '.join(list_recipe_names())}.",
    )


def list_recipe_names() -> list[str]:
    """Return the names of the included recipes."""
    known = recipes_dir()
    return sorted(str(p.relative_to(known).with_suffix("")) for p in known.rglob("*.yaml"))


def read_recipe_files(path: Path) -> Iterator[RecipeFile]:
    """Read a recipe, then its base, then the base of that, and so on.

    Args:
        path: the recipe's file.

    Raises:
        UsageError: a file cannot be read, is not a YAML mapping or has a key twice; or a base does
            not exist, or is built on itself.
    """
    earlier: list[Path] = []
    while True:
        file = read_recipe_file(path)
        yield file
        if file.base is None:
            return
        earlier.append(path)
        path = find_base(file)
        if any(path.samefile(other) for other in earlier):
            chain = " -> ".join(map(str, [*earlier, path]))
            raise UsageError(
                f"{file.describe_place(BASE)}: the bases form a circle: {chain}",
                "each of these recipes needs another one's values first.",
                f"remove {BASE} from one of them.",
            )


def _check_empty(path: Path, parsed: dict[str, Any]) -> None:
    """Refuse a part with nothing in it: it reads as if the part were wanted, and would be none."""
    for section, key in OPTIONAL_PARTS:
        values = parsed.get(section)
        if isinstance(values, dict) and getattr(values.get(key), "text", None) == "":
            raise UsageError(
                f"{path}: {section}.{key} is empty",
                "an empty value reads as null: the part would be off, as if the key were not "
                "there.",
                f"write its keys below it, `{key}: {{}}` for the defaults, or `{key}: null` for "
                "none.",
            )


def read_recipe_file(path: Path) -> RecipeFile:
    """Read one file of a recipe.

    Raises:
        UsageError: it cannot be read, is not a YAML mapping, has a key twice, or `base` is not a
            name or path.
    """
    try:
        text = path.read_text(encoding="utf-8")
        parsed = parse_yaml(text)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(
            f"{path}: not readable as YAML: {error}",
            "the recipe cannot be used.",
            "fix the line that the message names.",
        ) from None
    if not isinstance(parsed, dict):
        raise UsageError(
            f"{path}: not a YAML mapping of sections",
            "a recipe consists of sections such as data and train.",
            "start from a recipe in launch/recipes/.",
        )
    _check_empty(path, parsed)
    base = parsed.pop(BASE, None)
    file = RecipeFile(path, text, resolve(parsed), _read_base(base))
    if file.base is None and not _is_null(base):
        raise UsageError(
            f"{file.describe_place(BASE)}: {BASE} is not the name or path of a recipe",
            "a recipe is built on one other recipe, which may have a base of its own.",
            f"write it like {BASE}: toy/align_image, or {BASE}: ../my_recipe.yaml.",
        )
    return file


def find_base(file: RecipeFile) -> Path:
    """Return the file of the recipe on which another is built.

    Args:
        file: names its base.

    Raises:
        UsageError: there is no such recipe.
    """
    assert file.base is not None
    place, problem = file.describe_place(BASE), ""
    try:
        given = expand_path(file.base)
        beside = file.path.parent / given
        if os.path.isfile(beside):
            return beside
        shipped = _find_shipped(given)
        if shipped is not None:
            return shipped
        problem = f"{beside} is {'a directory' if beside.is_dir() else 'not there'}"
    except (ValueError, OSError) as error:
        problem = str(error)
    raise UsageError(
        f"{place}: {BASE}: {file.base}: no such recipe ({problem})",
        f"{file.path} only holds what differs from it.",
        f"give a path relative to {file.path.parent}, or one of: {', '.join(list_recipe_names())}.",
    )


def _read_base(value: Any) -> str | None:
    text = value.text if isinstance(value, Plain) else value
    return text if isinstance(text, str) and not _is_null(value) and text.strip() else None


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Plain) and value.value is None)


def _find_shipped(name: Path) -> Path | None:
    known = recipes_dir()
    candidates = (known / name, known / f"{name}.yaml")
    return next((path for path in candidates if os.path.isfile(path)), None)
