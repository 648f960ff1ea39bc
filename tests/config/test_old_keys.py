"""A recipe of 0.1.0 is refused, and every renamed key or value is answered by its new name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.config.keys import describe_keys, find_section
from onellm_dist.config.load import load_config
from onellm_dist.config.old_keys import (
    RENAMED_KEYS,
    RENAMED_SECTIONS,
    RENAMED_VALUES,
    find_new_name,
)

OLD = {
    line.split()[0]: line.split()[1:]
    for line in (Path(__file__).parent / "keys_0_1_0.txt").read_text().splitlines()
}
"""Every key of 0.1.0, with the values it could have where they were a fixed choice."""
TODAY = {key.name.replace("[]", "") for key in describe_keys()}
RECIPE: dict[str, Any] = {
    "model": {"preset": "toy"},
    "data": {"mixture": [{"path": "image"}], "global_batch": 8},
    "train": {"stage": "align", "steps": 3},
    "optim": {"lr": 1e-3},
}


def load(tmp_path: Path, recipe: dict[str, Any], *overrides: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError) as info:
        load_config(path, overrides)
    assert info.value.exit_code == 2
    return str(info.value)


@pytest.mark.parametrize("key", OLD)
def test_every_key_of_0_1_0_stands_or_is_answered_by_its_new_name(key: str, tmp_path: Path) -> None:
    new = find_new_name(key)
    if new is None:
        assert key in TODAY, f"{key} is gone: add its new name to config/old_keys.py"
        return
    assert key not in TODAY
    assert new in TODAY
    assert f"{key} is called {new} now" in load(tmp_path, RECIPE, f"{key}=1")


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in OLD.items() for v in values])
def test_every_value_of_0_1_0_stands_or_is_answered_by_its_new_name(
    key: str, value: str, tmp_path: Path
) -> None:
    today = find_new_name(key) or key
    renamed = RENAMED_VALUES.get((today, value))
    if renamed is None:
        assert not _choices(today) or value in _choices(today), f"{key}={value} is gone"
    else:
        message = load(tmp_path, RECIPE, f"{today}={value}")
        assert f"{today}: {value} is called {renamed} now" in message


def _choices(key: str) -> list[str]:
    *path, name = key.split(".")
    section = find_section(path)
    assert section is not None
    field = {f.alias or n: f for n, f in section.model_fields.items()}[name]
    kinds = [field.annotation, *get_args(field.annotation)]
    return [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]


def test_a_whole_recipe_of_0_1_0_is_answered_key_by_key(tmp_path: Path) -> None:
    recipe = {
        **RECIPE,
        "guard": {"policy": "skip", "window": 64},
        "track": {"starve_share": 0.1, "starve_steps": 5},
        "engine": {"name": "fsdp", "reduce_every": "micro_step"},
        "data": {**RECIPE["data"], "max_tombstones": 5, "new_segment": True},
    }
    message = load(tmp_path, recipe)
    assert "7 problems in the recipe" in message
    for old, new in (
        ("guard.policy", "stability.policy"),
        ("guard.window", "stability.window"),
        ("track.starve_share", "track.underused_expert_share"),
        ("data.max_tombstones", "data.max_skipped_samples"),
        ("engine.reduce_every: micro_step", "micro_batch"),
    ):
        assert f"{old} is called {new} now" in message
    assert "guard is called stability now" in load(tmp_path, {**RECIPE, "guard": {}})


def test_no_new_name_is_itself_an_old_one() -> None:
    assert not set(RENAMED_KEYS.values()) & set(RENAMED_KEYS)
    assert not set(RENAMED_SECTIONS.values()) & set(RENAMED_SECTIONS)
