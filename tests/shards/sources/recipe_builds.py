"""Build from a recipe in one call, as `onellm shards build RECIPE` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onellm_dist.shards.build.recipe import build_values, read_recipe
from onellm_dist.shards.sources.base import BuildReport


def build_recipe(
    recipe: Path, *, overwrite: bool = False, **overrides: Any
) -> tuple[Path, BuildReport]:
    """Build from a dataset recipe. Its `inputs` and `out` are relative to the current folder.

    Args:
        recipe: the YAML file.
        overwrite: replace datasets at the output.
        overrides: they replace the recipe's keys, or its options by name.

    Returns:
        The output folder, and what was built.

    Raises:
        UsageError: the recipe cannot be read, or has a key that is not understood.
        OneLLMError: the build was given up.
    """
    values, options = read_recipe(recipe, **overrides)
    return Path(values["out"]), build_values(values, options, overwrite=overwrite)
