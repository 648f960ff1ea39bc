"""`onellm train RECIPE --show`: the resolved recipe, what trains, and the first steps.

Nothing is written but the user's cache of remote datasets, no weight is read and no rank started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import EXIT_DONE, EXIT_USAGE, OneLLMError
from onellm_dist.common.output import write_output
from onellm_dist.config.load import LoadedRecipe, load_recipe
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.valid_parts import ValidParts
from onellm_dist.data.epochs import resolve_epochs
from onellm_dist.train.recipe_summary.values import format_values
from onellm_dist.train.start.recipe_check import find_problems

DescribePlan = Callable[[Path | str, Sequence[str]], list[str]]
"""(recipe, overrides) -> what the planner says, in lines."""


def show_recipe(
    recipe: Path | str, overrides: Sequence[str], *, describe_plan: DescribePlan | None = None
) -> int:
    """Print what a recipe says and what a start of it would do.

    Args:
        recipe: a file, or the name of a recipe that ships.
        overrides: `key=value`, each for one key of the recipe.
        describe_plan: says what the planner says; default: nothing.

    Returns:
        The exit code: that of wrong usage if a start would be refused.

    Raises:
        UsageError: the recipe is wrong by itself. What it names may be missing: that is shown.
    """
    loaded = load_recipe(recipe, overrides)
    for line in (*_describe_files(loaded), *format_values(loaded)):
        write_output(line)
    problems = find_problems(ValidParts.from_config(loaded.config))
    lines, refused = _describe_work(loaded.config)
    for line in lines:
        write_output(line)
    if describe_plan is not None:
        write_output("\nPlan", *describe_plan(recipe, overrides))
    if problems:
        write_output("\nA start would be refused:")
    for problem in problems:
        write_output(f"  - {problem}")
    return EXIT_USAGE if problems or refused else EXIT_DONE


def _describe_files(loaded: LoadedRecipe) -> list[str]:
    recipe, *bases = [file.path for file in loaded.layers.files]
    return [f"Recipe {recipe}", *(f"  built on {base}" for base in bases), ""]


def _describe_work(config: RunConfig) -> tuple[list[str], bool]:
    """The tables that need the model, and whether a start would be refused for one of them."""
    from onellm_dist.train.recipe_summary.first_steps import format_first_steps
    from onellm_dist.train.recipe_summary.parameters import format_parameters

    model: Any = None
    tokenizer: Any = None
    lines, refused = ["", "Parameters"], False
    try:
        model, tokenizer = _open_model(config)
        lines += format_parameters(config, model)
    except OneLLMError as error:
        lines += _explain(error)
        refused = True
    lines += ["", "First steps"]
    if model is None:
        lines.append("  not shown: the plan needs the model's modalities and tokenizer")
        return lines, refused
    try:
        lines += format_first_steps(resolve_epochs(config), model, tokenizer)
    except OneLLMError as error:
        lines += _explain(error)
        refused = True
    return lines, refused


def _open_model(config: RunConfig) -> tuple[Any, Any]:
    from onellm_dist.model.weights.lazy import open_empty_model

    section = config.model
    model, processor = open_empty_model(
        path=section.path, preset=section.preset, span_positions=section.span_positions
    )
    return model, processor.tokenizer


def _explain(error: OneLLMError) -> list[str]:
    """Why a table is not shown; a list of problems stands at the end of the output."""
    first, *others = error.what.splitlines()
    remedy = "" if others or not error.do else f": {error.do}"
    return [f"  not shown: {first.rstrip('.')}{remedy}"]
