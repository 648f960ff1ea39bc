"""`onellm train RECIPE --show`: the resolved recipe, what trains, and the first steps.

Nothing is written but the user's cache of remote datasets, no weight is read and no rank started.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import EXIT_DONE, OneLLMError
from onellm_dist.config.load import LoadedRecipe, load_recipe
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.recipe_check import find_problems
from onellm_dist.train.recipe_summary.values import format_values


def show_recipe(recipe: Path | str, overrides: Sequence[str]) -> int:
    """Print what a recipe says and what a start of it would do.

    Args:
        recipe: a file, or the name of a recipe that ships.
        overrides: `key=value`, each for one key of the recipe.

    Returns:
        The exit code.

    Raises:
        UsageError: the recipe is wrong by itself. What it names may be missing: that is shown.
    """
    loaded = load_recipe(recipe, overrides)
    for line in (*_describe_files(loaded), *format_values(loaded), *_describe_work(loaded.config)):
        print(line)
    config = loaded.config
    problems = find_problems({name: getattr(config, name) for name in RunConfig.model_fields})
    if problems:
        print("\nA start would be refused:")
    for problem in problems:
        print(f"  - {problem}")
    return EXIT_DONE


def _describe_files(loaded: LoadedRecipe) -> list[str]:
    recipe, *bases = [file.path for file in loaded.layers.files]
    return [f"Recipe {recipe}", *(f"  built on {base}" for base in bases), ""]


def _describe_work(config: RunConfig) -> list[str]:
    """The tables that need the model; why there is none, if it cannot be opened."""
    from onellm_dist.train.recipe_summary.first_steps import format_first_steps
    from onellm_dist.train.recipe_summary.parameters import format_parameters

    model: Any = None
    tokenizer: Any = None
    lines = ["", "Parameters"]
    try:
        model, tokenizer = _open_model(config)
        lines += format_parameters(config, model)
    except OneLLMError as error:
        lines += _explain(error)
    lines += ["", "First steps"]
    if model is None:
        return [*lines, "  not shown: the plan needs the model's modalities and tokenizer"]
    try:
        lines += format_first_steps(config, model, tokenizer)
    except OneLLMError as error:
        lines += _explain(error)
    return lines


def _open_model(config: RunConfig) -> tuple[Any, Any]:
    from onellm_dist.model.lazy_weights import open_empty_model

    model, processor = open_empty_model(path=config.model.path, preset=config.model.preset)
    return model, processor.tokenizer


def _explain(error: OneLLMError) -> list[str]:
    """Why a table is not shown; a list of problems stands at the end of the output."""
    first, *others = error.what.splitlines()
    remedy = "" if others or not error.do else f": {error.do}"
    return [f"  not shown: {first.rstrip('.')}{remedy}"]
