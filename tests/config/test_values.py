"""Values of a recipe as people type them: text stays text, and numbers have ranges."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onellm_dist.common.errors import UsageError
from onellm_dist.common.secrets import MASK
from onellm_dist.config.load import find_run_dir, load_config

RECIPE = """
model: {preset: toy}
data:
  mixture:
    - {path: image}
  global_batch: 8
train: {stage: align, steps: 3}
optim: {lr: 1e-3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "/x/exp #3",
        "/x/a: b",
        "/x/[y]",
        "/x/{y}",
        "22_05",
        "on",
        "null_1",
        "1e3",
        "/x/ä b",
        "a'b",
        "-",
    ],
)
def test_a_path_on_the_command_line_is_what_was_typed(recipe: Path, text: str) -> None:
    assert load_config(recipe, [f"run.dir={text}"]).run.dir == Path(text)
    assert find_run_dir(recipe, [f"run.dir={text}"]) == Path(text)
    assert load_config(recipe, [f"model.path={text}"]).model.path == Path(text)


@settings(deadline=None)  # a busy machine takes as long as it takes
@given(st.text(st.characters(exclude_categories=["C"], exclude_characters="$'\"~"), min_size=1))
@example("é" * 127 + "/x")
@example("é" * 128)
@pytest.mark.seconds
def test_any_path_survives_command_line_and_config_yaml(text: str) -> None:
    if not text.strip() or "://" in text or MASK in text:  # a masked secret is refused
        return
    if max(len(os.fsencode(name)) for name in text.split("/")) > 255:  # no file can have it
        with pytest.raises(UsageError, match="longer than a path or a name can be"):
            load_config("toy/align_image", [f"run.dir={text}"])
        return
    config = load_config("toy/align_image", [f"run.dir={text}"])
    assert config.run.dir == Path(text)
    assert Path(yaml.safe_load(config.to_yaml())["run"]["dir"]) == Path(text)


@pytest.mark.parametrize(
    "name", ["21", "22.05", "22_05", "on", "no", "1:30", "2024-01-01", "0x1f", "1e3", ".5", "007"]
)
def test_a_dataset_whose_name_looks_like_a_number_is_that_dataset(
    tmp_path: Path, recipe: Path, name: str
) -> None:
    by_override = load_config(recipe, [f"data.mixture=[{{path: {name}, weight: 2}}]"])
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("path: image", f"path: {name}"))
    again = tmp_path / "again.yaml"
    again.write_text(by_override.to_yaml())
    for config in (by_override, load_config(other), load_config(again)):
        assert [str(entry.path) for entry in config.data.mixture] == [name]


def test_home_and_variables_expand_everywhere_alike(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    recipe.write_text(RECIPE + "run: {dir: '${SCRATCH}/r'}\n")
    assert load_config(recipe).run.dir == find_run_dir(recipe, []) == Path("/scratch/r")
    for text, wanted in (("~/x", "/home/me/x"), ("$SCRATCH/x", "/scratch/x"), ("/a$b", "/a$b")):
        for key in ("run.dir", "data.root", "data.cache_dir", "checkpoint.resume", "model.path"):
            section, name = key.split(".")
            config = load_config(recipe, [f"{key}={text}"])
            assert getattr(getattr(config, section), name) == Path(wanted), key
        assert find_run_dir(recipe, [f"run.dir={text}"]) == Path(wanted)
    assert load_config(recipe, ["data.root=s3://${SCRATCH}/x"]).data.root == "s3:///scratch/x"
    with pytest.raises(UsageError, match="variable NOWHERE is not set"):
        load_config(recipe, ["run.dir=${NOWHERE}/x"])


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (RECIPE + "optim: {lr: 2e-3}\n", "optim"),
        (RECIPE.replace("steps: 3", "steps: 3, steps: 4"), "steps"),
        (RECIPE.replace("{path: image}", "{path: image, path: imu}"), "path"),
        (
            RECIPE.replace("  global_batch: 8", "  global_batch: 8\n  global_batch: 9"),
            "global_batch",
        ),
    ],
    ids=["section", "flow", "in_a_list", "block"],
)
def test_a_repeated_key_is_refused(recipe: Path, text: str, key: str) -> None:
    recipe.write_text(text)
    with pytest.raises(UsageError, match=f"the key {key} is there twice"):
        load_config(recipe)


def test_a_merged_key_may_be_replaced(recipe: Path) -> None:
    recipe.write_text(
        RECIPE.replace("train: {stage: align, steps: 3}", "x: &x {stage: align, steps: 3}\n")
        + "train: {<<: *x, steps: 5}\n"
    )
    with pytest.raises(UsageError, match="unknown key x") as caught:
        load_config(recipe)
    assert "1 problem" in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "optim.betas=[1.5, 2]",
        "optim.betas=[0.9, 1]",
        "optim.betas=[-0.1, 0.9]",
        "optim.lr=.inf",
        "optim.lr=nan",
        "optim.lr=-1",
        "optim.min_lr=1",
        "optim.eps=0",
        "optim.weight_decay=-0.1",
        "optim.weight_decay=.nan",
        "optim.grad_clip=.inf",
        "optim.warmup_steps=-1",
        "train.steps=0",
        "train.steps=1.5",
        "train.steps=yes",
        "train.steps=1:30",
        "run.seed=-1",
        "stability.threshold=.inf",
        "stability.hang_minutes=-1",
        "track.underused_expert_share=1.5",
        "track.profile_steps=[5, 3]",
        "data.cache_gb=.inf",
        "checkpoint.every_minutes=0",
        "run.dir=",
    ],
)
def test_impossible_numbers_are_refused(recipe: Path, override: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(recipe, [override])
    key = override.split("=", maxsplit=1)[0]
    assert key in str(caught.value) or key.split(".")[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [("train.steps=1_000", 1000), ("train.steps=010", 10), ("train.steps=+7", 7)],
)
def test_integers_are_decimal(recipe: Path, override: str, value: int) -> None:
    assert load_config(recipe, [override]).train.steps == value


TEXTS = """
    8e42137 12345e6 1e400 1.5e999 1_000 1_0.5 007 -007 0o17 0x1f 0b11 12:30:00 1:30 2024-01-01
    2024-01-01T00:00:00Z y n tRue << inf nan 1e 1.2.3 22_05 + = s3://bucket/x a:b 1e1e1
"""
FREE: dict[str, Any] = {
    **{text: text for text in (*TEXTS.split(), "1" * 1001)},
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "0": 0,
    "-7": -7,
    "+7": 7,
    "1e3": 1e3,
    "1e-1": 0.1,
    "2.5e6": 2.5e6,
    "100e6": 1e8,
    ".5": 0.5,
    "0.90": 0.9,
    "1.": 1.0,
    "1.10": 1.1,
    "1.0e+300": 1e300,
    ".inf": float("inf"),
    "-.inf": float("-inf"),
    str(2**70): 2**70,
}


@pytest.mark.parametrize("text", FREE, ids=lambda text: text[:30])
@pytest.mark.seconds
def test_where_any_value_may_stand_only_what_loses_nothing_is_a_number(
    recipe: Path, tmp_path: Path, text: str
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(f"{RECIPE}track: {{options: {{wandb: {{key: {text}}}}}}}\n")
    block = tmp_path / "block.yaml"
    block.write_text(f"{RECIPE}track:\n  options:\n    wandb:\n      key: {text}\n")
    for config in (
        load_config(other),
        load_config(block),
        load_config(recipe, [f"track.options={{wandb: {{key: {text}}}}}"]),
        load_config(recipe, [f"track.options.wandb.key={text}"]),
    ):
        found = config.track.options["wandb"]["key"]
        assert found == FREE[text] and type(found) is type(FREE[text])


@pytest.mark.parametrize("text", ["yes", "No", "on", "OFF"])
def test_a_scalar_of_two_meanings_is_refused_where_any_value_may_stand(
    recipe: Path, text: str
) -> None:
    for override in (
        f"track.options.wandb.sync={text}",
        f"track.options={{wandb: {{sync: [{text}]}}}}",
        f"optim.options={{nesterov: {text}}}",
    ):
        with pytest.raises(UsageError, match=f"{text} is a truth value to some") as caught:
            load_config(recipe, [override])
        assert f"write true or false, or '{text}' in quotes" in str(caught.value)
    quoted = load_config(recipe, [f"track.options.wandb.sync='{text}'"])
    assert quoted.track.options == {"wandb": {"sync": text}}
    assert load_config(recipe, ["data.augment=no"]).data.augment is False, "the key says which"


@pytest.mark.parametrize("text", ["lr: high #3", "a, b", "- x", "50%", "&a", "*a", "|", "!x", "?"])
def test_a_text_for_any_value_is_taken_whole(recipe: Path, text: str) -> None:
    config = load_config(recipe, [f"track.options.wandb.notes={text}"])
    assert config.track.options["wandb"]["notes"] == text


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(sorted(FREE))
    | st.from_regex(r"[-+.0-9_exo:yn]{1,8}", fullmatch=True)
    | st.sampled_from(["yes", "No", "on", "OFF", "<<", "=", "'", '"', "# x", "- a", "a: b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab01 ~", max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@example(float("inf"))
@given(JSON)
@pytest.mark.seconds
def test_any_option_is_the_same_in_config_yaml(tmp_path_factory: Any, value: Any) -> None:
    options = {"wandb": {"key": value}}
    config = load_config("toy/align_image", ["run.dir=x"])
    track = config.track.model_copy(update={"options": options})
    path = tmp_path_factory.getbasetemp() / "again.yaml"
    path.write_text(config.model_copy(update={"track": track}).to_yaml(), encoding="utf-8")
    assert load_config(path).track.options == options
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["track"]["options"] == options


def test_options_of_an_optimizer_take_the_types_of_its_own(recipe: Path) -> None:
    overrides = ["optim.name=sgd", "optim.options={momentum: 1e-1, nesterov: true}"]
    assert load_config(recipe, overrides).optim.options == {"momentum": 0.1, "nesterov": True}


def test_the_last_of_two_overrides_of_a_key_counts_in_every_place(recipe: Path) -> None:
    given_twice = ["run.dir=/a", "run.dir=/b"]
    assert (
        load_config(recipe, given_twice).run.dir == find_run_dir(recipe, given_twice) == Path("/b")
    )


@pytest.mark.parametrize("tag", ["set {a, b}", "omap [a: 1]", "pairs [a: 1]", "binary aGk="])
def test_kinds_of_values_that_no_recipe_has_are_refused(recipe: Path, tag: str) -> None:
    recipe.write_text(recipe.read_text() + f"track: {{options: {{wandb: {{x: !!{tag}}}}}}}\n")
    with pytest.raises(UsageError, match=rf"!!{tag.split(maxsplit=1)[0]} is not a kind of value"):
        load_config(recipe)
