"""Reading a recipe: YAML plus `key=value` overrides, validated before anything starts.

Every problem is reported at once; an unknown key is refused with the nearest known name.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import MixtureEntry, RunConfig


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `key=value` overrides (values are YAML).

    `recipe` is a file, or the name of a recipe that ships with the package (`toy/align_image`).
    `model.path=` and `model.preset=` replace each other.

    Raises:
        UsageError: the file is missing or no YAML mapping, or any key or value is wrong (all of them are listed).
    """
    path = find_recipe(recipe)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: not readable as YAML: {error}",
            "the recipe cannot be used.",
            "mend the line it names.",
        ) from None
    if not isinstance(raw, dict):
        raise UsageError(
            f"{path}: a recipe is a YAML mapping of sections",
            "this file holds something else.",
            "start from one in launch/recipes/.",
        )
    for item in overrides:
        _apply_override(raw, item)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(e) for e in error.errors()]
        raise UsageError(
            f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe\n"
            + "\n".join(f"  - {p}" for p in problems),
            "nothing was started.",
            "mend the recipe or the key=value given on the command line.",
        ) from None


def find_recipe(recipe: Path) -> Path:
    """The recipe's file: as given, or by name among the recipes in `launch/recipes/` (checkout or wheel).

    Raises:
        UsageError: no such file and no such name.
    """
    from onellm_dist.common.resources import recipes_dir

    if recipe.is_file():
        return recipe
    known = recipes_dir()
    for candidate in (known / recipe, known / f"{recipe}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(str(p.relative_to(known).with_suffix("")) for p in known.rglob("*.yaml"))
    raise UsageError(
        f"no recipe {recipe}",
        "it is neither a file nor a recipe that ships with onellm_dist.",
        f"give a file, or one of: {', '.join(names)}.",
    )


def _apply_override(raw: dict[str, Any], item: str) -> None:
    key, sep, text = item.partition("=")
    if not sep or not key:
        raise UsageError(
            f"{item!r} is not key=value",
            "an override names one key of the recipe.",
            "write it like train.steps=10.",
        )
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UsageError(
            f"{item!r}: the value is not YAML: {error}",
            "it cannot be read.",
            "quote it for your shell.",
        ) from None
    *sections, leaf = key.split(".")
    node = raw
    for name in sections:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UsageError(
                f"{item!r}: {name} is not a section",
                "it has no keys below it.",
                "see launch/recipes/ for the keys.",
            )
    node[leaf] = value
    if key in ("model.path", "model.preset") and value is not None:
        node["preset" if leaf == "path" else "path"] = None


def _problem(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _fields_at(location[:-1]), n=1, cutoff=0.5)
        return f"unknown key {key}" + (
            f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        )
    if error["type"] == "missing":
        return f"missing key {key}"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = "" if isinstance(given, (dict, list)) else f" (given: {given!r})"
    return f"{key}: {message}{shown}" if key else message


def _fields_at(location: list[str]) -> list[str]:
    """The known keys of the section at `location`."""
    model: Any = RunConfig
    for part in location:
        if part.isdigit():
            model = MixtureEntry
            continue
        field = model.model_fields.get(part)
        if field is None:
            return []
        model = field.annotation if hasattr(field.annotation, "model_fields") else MixtureEntry
    return [field.alias or name for name, field in model.model_fields.items()]
