"""Reading a recipe: YAML plus `key=value` overrides, validated before anything starts.

A text is taken as it was typed: `run.dir=/x/exp #3` and a dataset `22_05` mean these names. All
problems are reported at once. An unknown key is refused with the most similar known name, a
key of 0.1.0 with its name today.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from onellm_dist.common.errors import UsageError
from onellm_dist.common.secrets import MASK
from onellm_dist.config.keys import find_section, list_key_names
from onellm_dist.config.old_keys import explain_old_key, explain_old_value
from onellm_dist.config.schema import RunConfig, RunSection, Section
from onellm_dist.config.values import get_fields, list_ambiguous, parse_override, resolve
from onellm_dist.config.yaml_text import parse_yaml

FindProblems = Callable[[Mapping[str, Section]], Sequence[str]]
"""Finds further problems in the sections that are valid, by their names."""


def load_config(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    find_problems: FindProblems | None = None,
) -> RunConfig:
    """Load a recipe and apply `key=value` overrides.

    Args:
        recipe: a file, or the name of a recipe that ships with the package (`toy/align_image`).
        overrides: `section.key=value` each. A key that takes text or a path takes everything
            behind the equals sign; other values are YAML. `model.path=` and `model.preset=`
            replace each other.
        find_problems: looks for further problems, such as missing files; they are listed with
            those of the recipe.

    Raises:
        UsageError: the file is missing or is not a YAML mapping, or a key or value is wrong (all
            problems are listed).
    """
    path = find_recipe(recipe)
    raw = read_recipe(path, overrides)
    problems = [*_find_masked(raw), *list_ambiguous(raw)]
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems += [problem for e in error.errors() for problem in _describe_problem(e)]
    if find_problems is not None:
        problems += find_problems(_list_valid_sections(raw, config))
    if config is None or problems:
        raise UsageError(
            f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe\n"
            + "\n".join(f"  - {p}" for p in problems),
            "nothing was started.",
            "fix the recipe or the key=value on the command line.",
        ) from None
    return config


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a recipe with its overrides, not validated yet.

    Args:
        path: the recipe's file.
        overrides: see `load_config`.

    Raises:
        UsageError: the file cannot be read, is not a YAML mapping or has a key twice, or an
            override does not name a key.
    """
    try:
        raw = resolve(parse_yaml(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(
            f"{path}: not readable as YAML: {error}",
            "the recipe cannot be used.",
            "fix the line that the message names.",
        ) from None
    if not isinstance(raw, dict):
        raise UsageError(
            f"{path}: not a YAML mapping of sections",
            "a recipe consists of sections such as data and train.",
            "start from a recipe in launch/recipes/.",
        )
    for item in overrides:
        _apply_override(raw, item)
    return raw


def find_run_dir(recipe: Path | str, overrides: Sequence[str]) -> Path:
    """`run.dir`, also where the recipe is wrong elsewhere: `exit.json` must have a place."""
    raw: dict[str, Any] = {}
    with suppress(UsageError):
        raw = read_recipe(find_recipe(recipe))
    for item in overrides:
        with suppress(UsageError):
            _apply_override(raw, item)
    run = raw.get("run")
    try:
        return RunSection(dir=run["dir"]).dir if isinstance(run, dict) else RunSection().dir
    except (ValidationError, KeyError):
        return RunSection().dir


def _find_masked(value: Any, key: str = "") -> list[str]:
    """A problem for each value in which a secret was masked, as in a run's `config.yaml`."""
    if isinstance(value, str) and MASK in value:
        return [
            f"{key}: {value!r} holds {MASK}, which stands for a secret that was masked; "
            "write the value again"
        ]
    if isinstance(value, Mapping):
        items = [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{key}[{number}]", item) for number, item in enumerate(value)]
    else:
        return []
    return [problem for name, item in items for problem in _find_masked(item, name)]


def _list_valid_sections(raw: Mapping[str, Any], config: RunConfig | None) -> dict[str, Section]:
    """The sections of a recipe that are valid by themselves."""
    if config is not None:
        return {name: getattr(config, name) for name in RunConfig.model_fields}
    found: dict[str, Section] = {}
    for name in RunConfig.model_fields:
        section = find_section([name])
        assert section is not None
        with suppress(ValidationError):
            found[name] = section.model_validate(raw.get(name, {}))
    return found


def find_recipe(recipe: Path | str) -> Path:
    """Return a recipe's file: as given, or by name in `launch/recipes/` (checkout or wheel).

    Raises:
        UsageError: there is no such file and no such name.
    """
    from onellm_dist.common.resources import recipes_dir

    recipe = Path(recipe)
    if os.path.isfile(recipe):  # false, too, for what cannot be a path
        return recipe
    known = recipes_dir()
    for candidate in (known / recipe, known / f"{recipe}.yaml"):
        if os.path.isfile(candidate):
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
    *sections, leaf = key.split(".")
    node = raw
    annotation: Any = RunConfig
    for name in sections:
        node = node.setdefault(name, {})
        annotation = get_fields(annotation).get(name, Any)
        if not isinstance(node, dict):
            raise UsageError(
                f"{item!r}: {name} is not a section",
                "there are no keys below it.",
                "see launch/recipes/ for the keys.",
            )
    annotation = get_fields(annotation).get(leaf, Any)
    try:
        value = node[leaf] = resolve(parse_override(text, annotation), annotation)
    except yaml.YAMLError as error:
        raise UsageError(
            f"{item!r}: the value is not YAML: {error}",
            "it cannot be read.",
            "quote it for your shell.",
        ) from None
    if key in ("model.path", "model.preset") and value is not None:
        node["preset" if leaf == "path" else "path"] = None


def _describe_problem(error: Any) -> list[str]:
    """Return one of pydantic's errors as problems for the user."""
    location = [str(part) for part in error["loc"]]
    key, given = ".".join(location), error.get("input")
    if error["type"] == "extra_forbidden":
        return explain_old_key(key, given) or [_describe_unknown(location)]
    if error["type"] == "missing":
        return [f"missing key {key}"]
    renamed = explain_old_value(key, given)
    if renamed is not None:
        return [renamed]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(given, dict):  # names its keys itself
        return [message]
    shown = "" if isinstance(given, (dict, list)) else f" (given: {given!r})"
    return [f"{key}: {message}{shown}" if key else message]


def _describe_unknown(location: list[str]) -> str:
    section = find_section(location[:-1])
    names = [] if section is None else list_key_names(section)
    near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
    hint = f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
    return f"unknown key {'.'.join(location)}{hint}"
