"""A recipe is read, overridden by key, and refused with all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.config.load import load_config

GOOD = {
    "model": {"preset": "toy"},
    "data": {"mixture": [{"path": "image"}], "global_batch": 8},
    "train": {"stage": "align", "steps": 3},
    "optim": {"lr": 1e-3},
}


def write(tmp_path: Path, recipe: object) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_defaults_and_overrides(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, GOOD),
        [
            "train.steps=7",
            "optim.betas=[0.9, 0.99]",
            "data.mixture=[{path: a, weight: 2}, {path: b}]",
            "run.dir=here",
        ],
    )
    assert config.train.steps == 7
    assert config.optim.betas == (0.9, 0.99)
    assert [(str(m.path), m.weight) for m in config.data.mixture] == [("a", 2.0), ("b", 1.0)]
    assert config.run.dir == Path("here")
    assert config.checkpoint.resume == "auto"


def test_token_budgets_are_numbers_or_auto(tmp_path: Path) -> None:
    recipe = write(tmp_path, GOOD)
    both = ["data.pack_llm_tokens=auto", "data.pack_encoder_tokens=auto"]
    assert load_config(recipe, both).data.finds_budgets
    given = load_config(recipe, ["data.pack_llm_tokens=5000"]).data
    assert (given.pack_llm_tokens, given.finds_budgets) == (5000, False)
    with pytest.raises(UsageError, match="both are auto, or both are numbers"):
        load_config(recipe, both[:1])
    for wrong in ("0", "-3", "2.5", "many", "true", "null", ".inf", "-.inf", ".nan", "9" * 400):
        with pytest.raises(UsageError, match="1 problem in") as caught:
            load_config(recipe, [f"data.pack_llm_tokens={wrong}"])
        words = "data.pack_llm_tokens: give a number of tokens above 0, or auto"
        assert words in caught.value.what


def test_a_masked_value_is_refused_by_its_key(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, GOOD),
        [
            "data.root=s3://me:Sw0rdf1sh@bucket/x",
            "track.options={wandb: {api_key: abcdefgh12}}",
            "data.mixture=[{path: a}, {path: 's3://me:Sw0rdf1sh@b/c'}]",
        ],
    )
    masked = tmp_path / "config.yaml"
    masked.write_text(config.to_yaml())
    with pytest.raises(UsageError, match="3 problems") as caught:
        load_config(masked)
    for key in ("data.root", "track.options.wandb.api_key", "data.mixture[1].path"):
        assert f"  - {key}: " in caught.value.what
    assert caught.value.what.count("write the value again") == 3
    again = ["data.root=s3://bucket/x", "track.options={}", "data.mixture=[{path: a}, {path: b}]"]
    assert load_config(masked, again).data.root is not None


def test_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["checkpoint.resume=some/where"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config


def test_path_and_preset_replace_each_other(tmp_path: Path) -> None:
    recipe = write(tmp_path, GOOD)
    by_path = load_config(recipe, ["model.path=m"])
    assert by_path.model.path == Path("m")
    assert by_path.model.preset is None
    back = load_config(recipe, ["model.path=m", "model.preset=toy"])
    assert back.model.preset == "toy"
    assert back.model.path is None


def test_two_lengths_on_one_command_line_are_refused() -> None:
    """Neither of the two may win in silence."""
    both = ["train.steps=5", "train.epochs=2"]
    for overrides in (both, both[::-1]):
        with pytest.raises(UsageError, match=r"set one of train\.steps and train\.epochs"):
            load_config("toy/align_image", overrides)
    last = load_config("toy/align_image", ["train.epochs=2", "train.epochs=null", "train.steps=5"])
    assert (last.train.steps, last.train.epochs) == (5, None)
    for one in ("train.steps=5", "train.epochs=2"):
        found = load_config("toy/align_image", [one]).train
        assert (found.steps, found.epochs) == ((5, None) if "steps" in one else (None, 2))


def test_all_problems_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    bad = {**GOOD, "train": {"stage": "algn", "steps": 0, "precison": "bf16"}, "optimm": {}}
    with pytest.raises(UsageError) as caught:
        load_config(write(tmp_path, bad), ["engine.nme=deepspeed", "data.mixture=[{pth: a}]"])
    text = str(caught.value)
    assert "did you mean train.precision?" in text
    assert "did you mean optim?" in text
    assert "did you mean engine.name?" in text
    assert "data.mixture.0.path" in text
    assert "train.stage" in text and "'algn'" in text
    assert "train.steps" in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "override", ["steps", "=3", "train.steps.deep=1", "train.steps=[", "model.path=null"]
)
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(UsageError):
        load_config(write(tmp_path, {**GOOD, "model": {"path": "m"}}), [override])


def test_both_model_sources_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exactly one"):
        load_config(write(tmp_path, {**GOOD, "model": {"path": "a", "preset": "toy"}}))


@pytest.mark.parametrize("content", ["- a list", "{unclosed", ""])
def test_no_mapping(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UsageError):
        load_config(path)


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="neither a file nor a recipe"):
        load_config(Path("no/such/recipe"))
