"""Reading a recipe: YAML files plus `key=value` overrides, validated before anything starts.

A text is taken as it was typed: `run.dir=/x/exp #3` and a dataset `22_05` mean these names. All
problems are reported at once. An unknown key is refused with the most similar known name, a
key of 0.1.0 with its name today.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.secrets import MASK
from onellm_dist.config.keys import find_section
from onellm_dist.config.layers import LayeredRecipe
from onellm_dist.config.meant_keys import suggest_keys
from onellm_dist.config.old_keys import explain_old_key, explain_old_value
from onellm_dist.config.recipe_files import RecipeFile, find_recipe, read_recipe_files
from onellm_dist.config.schema import RunConfig, RunSection
from onellm_dist.config.train_sections import NO_LENGTH
from onellm_dist.config.valid_parts import ValidParts, find_valid_parts
from onellm_dist.config.values import get_aliases, list_ambiguous

FindProblems = Callable[[ValidParts], Sequence[str]]
"""Finds further problems in what is valid of a recipe."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe."""

    config: RunConfig
    layers: LayeredRecipe
    """Where each of its values comes from."""


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
        UsageError: the file, or the recipe on which it is built, is missing or is not a YAML
            mapping, or a key or value is wrong (all problems are listed).
    """
    return load_recipe(recipe, overrides, find_problems=find_problems).config


def load_recipe(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    find_problems: FindProblems | None = None,
) -> LoadedRecipe:
    """Load a recipe as `load_config` does, and keep where each value comes from.

    Args:
        recipe: see `load_config`.
        overrides: see `load_config`.
        find_problems: see `load_config`.

    Raises:
        UsageError: see `load_config`.
    """
    path = find_recipe(recipe)
    layers = LayeredRecipe(list(read_recipe_files(path)), overrides)
    raw = layers.values
    problems = [
        problem + layers.describe_base_origin(re.split(r"[.\[]", problem.partition(":")[0]))
        for problem in (*_find_masked(raw), *list_ambiguous(raw))
    ]
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems += [
            problem + layers.describe_base_origin([str(part) for part in e["loc"]])
            for e in error.errors()
            for problem in _describe_problem(e)
        ]
    if _lacks_length(raw) and NO_LENGTH not in problems:
        problems.append(NO_LENGTH)
    if find_problems is not None:
        valid = find_valid_parts(raw) if config is None else ValidParts.from_config(config)
        problems += find_problems(valid)
    if config is None or problems:
        raise UsageError(
            f"{path}: {format_count(len(problems), 'problem')} in the recipe\n"
            + "\n".join(f"  - {p}" for p in problems),
            "nothing was started.",
            "fix the recipe or the key=value on the command line.",
        ) from None
    return LoadedRecipe(config, layers)


def find_run_dir(recipe: Path | str, overrides: Sequence[str]) -> Path:
    """`run.dir`, also where the recipe is wrong elsewhere: `exit.json` must have a place."""
    files: list[RecipeFile] = []
    with suppress(UsageError):
        files.extend(read_recipe_files(find_recipe(recipe)))  # keeps those before a wrong one
    layers = LayeredRecipe(files)
    for item in overrides:
        with suppress(UsageError):
            layers.put_override(item)
    run = layers.values.get("run")
    try:
        return RunSection(dir=run["dir"]).dir if isinstance(run, dict) else RunSection().dir
    except (ValidationError, KeyError):
        return RunSection().dir


def _lacks_length(raw: Mapping[str, Any]) -> bool:
    """Whether a recipe with a section `train` does not say how long the run is.

    The section's own check finds that only where all of its keys are valid.
    """
    train = raw.get("train")
    if not isinstance(train, Mapping):
        return False
    return train.get("steps") is None and train.get("epochs") is None


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


def _describe_problem(error: Any) -> list[str]:
    """Return one of pydantic's errors as problems for the user."""
    location = [str(part) for part in error["loc"]]
    key, given = ".".join(location), error.get("input")
    if error["type"] == "extra_forbidden":
        return explain_old_key(key, given) or [_describe_unknown(location, given)]
    if error["type"] == "missing":
        return [f"missing key {key}"]
    renamed = explain_old_value(key, given)
    if renamed is not None:
        return [renamed]
    if error["type"] in ("model_type", "model_attributes_type"):
        what = "is empty" if given is None else f"is a section, not {given!r}"
        return [f"{key} {what}: write its keys below it, or remove the line"]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(given, dict):  # names its keys itself
        return [message]
    shown = "" if isinstance(given, (dict, list)) else f" (given: {given!r})"
    return [f"{key}: {message}{shown}" if key else message]


def _describe_unknown(location: list[str], given: Any) -> str:
    *section, name = location
    prefix, key = "".join(f"{part}." for part in section), ".".join(location)
    alias = get_aliases(find_section(section)).get(name)
    if alias is not None:  # alone, it is known
        return f"{prefix}{alias} and {key} are one key: keep one"
    near = suggest_keys(section, name, given)
    if near == [key]:
        above, _, leaf = name.rpartition(".")
        return f"{key} is written as one key with a dot: in a file, {leaf} stands below {above}"
    return f"unknown key {key}" + (f"; did you mean {' or '.join(near)}?" if near else "")
