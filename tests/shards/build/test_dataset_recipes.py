"""The dataset recipes in shards/: each names an existing source, and every source has one."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from onellm_dist.cli.evaluate import evaluate
from onellm_dist.shards.build.recipe import read_recipe
from onellm_dist.shards.build.registry import all_sources, complete_options, get_source

FOLDER = Path(__file__).parents[3] / "shards"
RECIPES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_can_be_built_as_it_stands(recipe: Path) -> None:
    values, options = read_recipe(recipe)
    source = get_source(values["source"])
    own, settings = complete_options(source, options, name="x")
    assert set(own) == set(source.options)
    assert settings is None or settings.name == Path(values["out"]).name
    assert (values.get("inputs") is not None) == source.needs_input
    assert f"onellm shards build shards/{recipe.name}" in recipe.read_text() or source.name in (
        "toyworld",
    )


def test_benchmarks_are_built_where_they_are_looked_for() -> None:
    """`onellm evaluate` without `--data` finds what the recipes build."""
    default = inspect.signature(evaluate).parameters["data"].default
    folders = {Path(read_recipe(r)[0]["out"]).parent for r in RECIPES if r.stem.endswith("_eval")}
    assert folders == {default}


def test_every_source_has_a_recipe() -> None:
    assert {read_recipe(r)[0]["source"] for r in RECIPES} == set(all_sources())


@pytest.mark.parametrize("text", ["22_05", "010", "no", "2024-01-01", "1.50", "0x1F", "1e3"])
def test_text_in_a_recipe_stays_as_it_is_typed(tmp_path: Path, text: str) -> None:
    """YAML alone reads 2205, 8, false, a date, 1.5 and 31."""
    recipe = tmp_path / "r.yaml"
    options = f"options: {{name: {text}, limit: 10, check: no, captions: {text}, question: [a, b]}}"
    recipe.write_text(f"source: folder\ninputs: {text}\nout: {text}\n{options}\n")
    values, given = read_recipe(recipe)
    assert (values["inputs"], values["out"], given["name"]) == (text, text, text)
    own, settings = complete_options(get_source("folder"), given, name="x")
    assert own["captions"] == Path(text)
    assert settings is not None
    assert (settings.limit, settings.check, settings.question) == (10, False, "a|b")
