"""Dataset recipes: a YAML file with a source, its input and output, and options."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.build.build_dataset import build_dataset
from onellm_dist.shards.build.registry import all_sources, get_options
from onellm_dist.shards.build.workers import ArrayTask
from onellm_dist.shards.sources.base import BuildReport

KEYS = frozenset({"source", "inputs", "out", "workers", "seed", "options"})
"""The keys of a recipe."""


def read_recipe(recipe: Path, **overrides: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a dataset recipe.

    Args:
        recipe: the YAML file.
        overrides: they replace the recipe's keys, or its options by name.

    Returns:
        The values of its keys, and its options.

    Raises:
        UsageError: the recipe cannot be read, or has a key that is not understood.
    """
    try:
        text = recipe.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        typed = yaml.load(text, yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{recipe}: {error}",
            "the recipe cannot be read.",
            "see shards/folder.yaml for an example.",
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("options") or {}, dict):
        raise UsageError(
            f"{recipe} is not a mapping of keys to values.",
            "a dataset recipe is one.",
            "see shards/folder.yaml for an example.",
        )
    values = {k: v for k, v in content.items() if k != "options"}
    options = dict(content.get("options") or {})
    _keep_text(values, typed, ("source", "inputs", "out"))
    _keep_text(options, typed.get("options"), _list_text_options(values.get("source")))
    for key, value in overrides.items():
        (values if key in KEYS else options)[key] = value
    unknown, missing = sorted(set(values) - KEYS), sorted({"source", "out"} - values.keys())
    if unknown or missing:
        faults = [*(f"unknown key {k!r}" for k in unknown), *(f"no key {k!r}" for k in missing)]
        raise UsageError(
            f"{recipe}: {', '.join(faults)}.",
            "the recipe cannot be built as written.",
            f"its keys are: {', '.join(sorted(KEYS))}.",
        )
    return values, options


def _list_text_options(source: object) -> list[str]:
    """List the options of a source that are text or paths; none of an unknown source."""
    known = all_sources().get(str(source))
    options = get_options(known) if known is not None else {}
    return [name for name, option in options.items() if option.kind in (str, Path)]


def _keep_text(values: dict[Any, Any], typed: Any, names: Iterable[str]) -> None:
    """Put back the text of values that are text, and that YAML takes for something else.

    YAML reads `22_05` as 2205, `010` as 8 and `no` as false. Null stays null.
    """
    for name in names:
        value = values.get(name)
        if value is not None and not isinstance(value, (str, list, dict)):
            values[name] = typed[name]


def build_values(
    values: dict[str, Any],
    options: dict[str, Any],
    *,
    overwrite: bool = False,
    restart: bool = False,
    task: ArrayTask | None = None,
) -> BuildReport:
    """Build from the values and options of a recipe, as `read_recipe` returns them.

    Raises:
        OneLLMError: as `build_dataset`.
    """
    return build_dataset(
        values["source"],
        values.get("inputs"),
        values["out"],
        options=options,
        workers=int(values.get("workers", 1)),
        seed=int(values.get("seed", 0)),
        overwrite=overwrite,
        restart=restart,
        task=task,
    )
