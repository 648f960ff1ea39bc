"""The dataset recipes in shards/: each names an existing source, and every source has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from onellm_dist.shards.build.recipe import read_recipe
from onellm_dist.shards.build.registry import all_sources, complete_options, get_source

FOLDER = Path(__file__).parents[2] / "shards"
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


def test_every_source_has_a_recipe() -> None:
    assert {read_recipe(r)[0]["source"] for r in RECIPES} == set(all_sources())
