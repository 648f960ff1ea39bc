"""A recipe on another one: whose value holds, where it comes from, and bases that are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from onellm_dist.common.errors import UsageError
from onellm_dist.common.resources import recipes_dir
from onellm_dist.config.load import find_run_dir, load_config, load_recipe

COMPLETE = """\
run: {dir: runs/first, seed: 7}
model: {preset: toy}
data:
  mixture:
    - {path: image, weight: 2}
    - {path: imu}
  global_batch: 8
  validation: {split: test, samples: 4, every: 10}
train: {stage: align, steps: 3}
optim: {name: sgd, lr: 1e-3, options: {momentum: 0.9}}
track: {options: {wandb: {name: first}}}
"""
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_recipe(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_recipe


def refuse(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(recipe, overrides)
    return str(caught.value)


def test_sections_merge_key_by_key_and_other_values_replace(write: Write) -> None:
    write("first.yaml", COMPLETE)
    write("second.yaml", "base: first.yaml\nrun: {dir: runs/second}\ndata: {global_batch: 16}\n")
    third = write(
        "third.yaml",
        "base: second.yaml\n"
        "data: {mixture: [{path: fmri}], validation: {every: 5}}\n"
        "optim: {options: {nesterov: false}}\n",
    )
    config = load_config(third, ["data.global_batch=32"])
    assert (config.run.dir, config.run.seed) == (Path("runs/second"), 7)
    assert [(str(e.path), e.weight) for e in config.data.mixture] == [("fmri", 1.0)]
    assert config.data.global_batch == 32
    assert config.data.validation is not None
    assert (config.data.validation.split, config.data.validation.every) == ("test", 5)
    assert config.optim.options == {"nesterov": False}, "a mapping of options is one value"
    assert config.optim.name == "sgd"
    assert config.track.options == {"wandb": {"name": "first"}}


def test_null_turns_a_section_of_the_base_off(write: Write) -> None:
    write("first.yaml", COMPLETE)
    second = write("second.yaml", "base: first.yaml\ndata: {validation: null}\n")
    assert load_config(second).data.validation is None


def test_what_a_run_records_is_the_resolved_recipe(write: Write) -> None:
    write("first.yaml", COMPLETE)
    config = load_config(write("second.yaml", "base: first.yaml\nrun: {seed: 8}\n"))
    recorded = write("elsewhere/config.yaml", config.to_yaml())
    assert "base" not in recorded.read_text()
    assert load_config(recorded) == config


def test_a_base_is_a_name_or_a_path_from_the_file(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("team/first.yaml", COMPLETE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TEAM", str(tmp_path / "team"))
    monkeypatch.chdir(tmp_path)
    absolute = tmp_path / "team/first.yaml"
    for base in ("../team/first.yaml", "~/team/first.yaml", "${TEAM}/first.yaml", str(absolute)):
        recipe = write("mine/second.yaml", f"base: {base}\nrun: {{dir: x}}\n")
        for given in (recipe, recipe.relative_to(tmp_path)):
            assert load_config(given).data.global_batch == 8, base
    for name in ("toy/align_image", "toy/align_image.yaml"):
        shipped = load_config(write("mine/third.yaml", f"base: {name}\nrun: {{dir: x}}\n"))
        assert shipped == load_config("toy/align_image", ["run.dir=x"])
    write("mine/toy/align_image", COMPLETE)
    own = load_config(write("mine/third.yaml", "base: toy/align_image\n"))
    assert own.run.dir == Path("runs/first"), "a file beside the recipe comes first"


def test_home_and_variables_hold_in_a_base_as_in_a_recipe(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    text = COMPLETE.replace("runs/first", "'${SCRATCH}/r'").replace("data:", "data:\n  root: ~/d")
    write("first.yaml", text)
    second = write("second.yaml", "base: first.yaml\ncheckpoint: {resume: ~/step}\n")
    config = load_config(second)
    assert config.run.dir == find_run_dir(second, []) == Path("/scratch/r")
    assert config.data.root == Path("/home/me/d")
    assert config.checkpoint.resume == Path("/home/me/step")
    monkeypatch.delenv("SCRATCH")
    assert "variable SCRATCH is not set" in refuse(second)
    assert "(in " + str(second.parent / "first.yaml:1") in refuse(second)


@pytest.mark.parametrize("home", ["~nobody-has-this-name/x", "~nobody-has-this-name"])
def test_a_home_of_nobody_is_refused(write: Write, home: str) -> None:
    recipe = write("first.yaml", COMPLETE)
    assert "not a user with a home directory" in refuse(recipe, f"run.dir={home}")
    second = write("second.yaml", f"base: {home}\n")
    assert "not a user with a home directory" in refuse(second)


@pytest.mark.parametrize(
    "second", ["model: {path: m}", "model: {path: m, preset: null}"], ids=["path", "both"]
)
def test_a_model_path_replaces_the_preset_of_the_base(write: Write, second: str) -> None:
    write("first.yaml", COMPLETE)
    write("second.yaml", f"base: first.yaml\n{second}\n")
    config = load_config(write("third.yaml", "base: second.yaml\n"))
    assert (config.model.path, config.model.preset) == (Path("m"), None)
    back = load_config(write("fourth.yaml", "base: third.yaml\nmodel: {preset: toy}\n"))
    assert (back.model.path, back.model.preset) == (None, "toy")
    both = write("both.yaml", "base: second.yaml\nmodel: {preset: toy, path: m}\n")
    assert "exactly one" in refuse(both)


def test_circles_are_refused_by_name(write: Write, tmp_path: Path) -> None:
    first = write("first.yaml", "base: second.yaml\n")
    second = write("second.yaml", "base: sub/../third.yaml\n")
    third = write("third.yaml", "base: first.yaml\n")
    (tmp_path / "sub").mkdir()
    message = refuse(first)
    assert "circle" in message
    for path in (first, second, third):
        assert path.name in message
    own = write("own.yaml", "# mine\nbase: own.yaml\n")
    assert f"{own}:2: the bases form a circle: {own} -> {own}" in refuse(own)
    os.symlink(own, tmp_path / "link.yaml")
    own.write_text("base: link.yaml\n")
    assert "circle" in refuse(own)


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ("base: frist.yaml", "frist.yaml is not there"),
        ("base: .", "is a directory"),
        ("base: [first.yaml, second.yaml]", "built on one other recipe"),
        ("base: {path: first.yaml}", "built on one other recipe"),
        ("base: ''", "not the name or path"),
        ("base: ${NOT_SET}/x.yaml", "variable NOT_SET is not set"),
    ],
)
def test_a_base_that_cannot_be_is_explained(write: Write, base: str, problem: str) -> None:
    write("first.yaml", COMPLETE)
    recipe = write("mine.yaml", f"# mine\n{base}\n")
    message = refuse(recipe)
    assert f"{recipe}:2: " in message
    assert problem in message
    assert "toy/align_image" in message, "it says what can be written"


def test_a_damaged_base_is_named(write: Write) -> None:
    first = write("first.yaml", COMPLETE + "optim: {lr: 1}\n")
    second = write("second.yaml", "base: first.yaml\n")
    assert f"{first}: not readable as YAML" in refuse(second)
    first.write_bytes(b"\xff\xfe")
    assert f"{first}: not readable" in refuse(second)


def test_null_is_no_base(write: Write) -> None:
    for null in ("", "null", "~"):
        assert load_config(write("first.yaml", f"{COMPLETE}base: {null}\n")).run.seed == 7


def test_a_problem_names_the_file_that_has_it(write: Write) -> None:
    first = write(
        "first.yaml",
        COMPLETE.replace("steps: 3", "stepz: 3").replace("name: first", "on: yes"),
    )
    message = refuse(write("second.yaml", "base: first.yaml\nrun: {sed: 1}\n"))
    assert f"unknown key train.stepz; did you mean train.steps? (in {first}:9)" in message
    ambiguous = next(line for line in message.splitlines() if "track.options.wandb.on" in line)
    assert ambiguous.endswith(f"(in {first}:11)")
    own = next(line for line in message.splitlines() if "run.sed" in line)
    assert "(in " not in own, "the recipe itself is named at the top"
    assert "missing key train.steps" in message


def test_a_base_is_no_override(write: Write) -> None:
    recipe = write("first.yaml", COMPLETE)
    assert "stands in a recipe's file alone" in refuse(recipe, "base=toy/align_image")


def test_every_value_knows_its_place(write: Write) -> None:
    first = write("first.yaml", COMPLETE)
    second = write(
        "second.yaml", "base: first.yaml\nmodel:\n  path: m\ndata:\n  validation: {every: 5}\n"
    )
    overrides = [
        "train.steps=4",
        "track.options.wandb.mode=offline",
        "data.mixture=[{path: x}]",
        "checkpoint={every: 3}",
    ]
    layers = load_recipe(second, overrides).layers
    places = {
        "run.seed": f"{first}:1",
        "model.path": f"{second}:3",
        "model.preset": f"{second}:3",
        "data.global_batch": f"{first}:7",
        "data.mixture": "command line",
        "data.validation.split": f"{first}:8",
        "data.validation.every": f"{second}:5",
        "train.steps": "command line",
        "track.options": f"{first}:11, command line",
        "checkpoint.every": "command line",
        "checkpoint.keep": None,
        "data.workers": None,
    }
    assert {key: layers.describe_origin(key) for key in places} == places


NAMES = ("with", "trackers")
"""Both are the same key of `track`."""


@pytest.mark.parametrize(("earlier", "later"), [NAMES, NAMES[::-1], NAMES[:1] * 2, NAMES[1:] * 2])
def test_a_later_layer_replaces_a_key_by_either_of_its_names(
    write: Write, earlier: str, later: str
) -> None:
    first = write("first.yaml", COMPLETE.replace("track: {", f"track: {{{earlier}: [wandb, aim], "))
    text = f"base: first.yaml\ntrack:\n  project: mine\n  {later}: [mlflow]\n"
    second = write("second.yaml", text)
    loaded = load_recipe(second)
    assert loaded.config.track.trackers == ("mlflow",) and loaded.config.track.project == "mine"
    assert loaded.layers.describe_origin("track.with") == f"{second}:4"
    loaded = load_recipe(first, [f"track.{later}=[on]", f"track.{earlier}=[off]"])
    assert loaded.config.track.trackers == ("off",), "a text, under either name"
    assert loaded.layers.describe_origin("track.with") == "command line"
    loaded = load_recipe(first, [f"track={{{later}: [mlflow]}}"])
    assert loaded.config.track.trackers == ("mlflow",)


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]])
def test_both_names_of_a_key_in_one_file_are_refused(write: Write, names: tuple[str, str]) -> None:
    both = ", ".join(f"{name}: [{name}]" for name in names)
    first = write("first.yaml", COMPLETE.replace("track: {", f"track: {{{both}, "))
    problem = "track.with and track.trackers are one key: keep one"
    message = refuse(first)
    assert problem in message and "1 problem in" in message
    second = write("second.yaml", "base: first.yaml\n")
    assert f"{problem} (in {first}:11)" in refuse(second)
    for name in NAMES:
        assert load_config(second, [f"track.{name}=[aim]"]).track.trackers == ("aim",)


def test_a_section_that_is_replaced_has_no_old_places(write: Write) -> None:
    recipe = write("first.yaml", COMPLETE)
    whole = ["data.validation={split: val, samples: 2, every: 1}"]
    layers = load_recipe(recipe, [*whole, "data.validation.generate=1"]).layers
    assert layers.describe_origin("data.validation.split") == "command line"
    assert layers.describe_origin("data.validation.new_tokens") is None
    off = load_recipe(recipe, ["data.validation=null"]).layers
    assert off.describe_origin("data.validation") == "command line"


def test_lines_of_merged_keys_are_those_of_the_anchor(write: Write) -> None:
    write("first.yaml", COMPLETE)
    second = write("second.yaml", "base: first.yaml\nrun: &r {seed: 3}\ncheckpoint:\n  <<: *r\n")
    assert "did you mean run.seed?\n" in refuse(second)
    third = write("third.yaml", "base: second.yaml\n")
    assert f"did you mean run.seed? (in {second}:2)\n" in refuse(third)


def test_the_run_directory_is_known_also_with_a_broken_base(write: Write) -> None:
    second = write("second.yaml", "base: nowhere\nrun: {dir: here}\n")
    assert find_run_dir(second, []) == Path("here")
    assert find_run_dir(second, ["run.dir=there", "base=x"]) == Path("there")
    assert find_run_dir(write("third.yaml", "base: second.yaml\n"), []) == Path("here")


@pytest.mark.seconds
def test_every_recipe_that_ships_can_be_a_base(write: Write) -> None:
    for path in sorted(recipes_dir().rglob("*.yaml")):
        name = path.relative_to(recipes_dir()).with_suffix("")
        recipe = write("mine.yaml", f"base: {name}\nrun: {{seed: 5}}\n")
        assert load_config(recipe) == load_config(name, ["run.seed=5"])


def test_an_optional_part_that_is_left_empty_is_refused(write: Write) -> None:
    """`lora:` alone would train the whole LLM."""
    old, new = "train: {stage: align, steps: 3}", "train:\n  stage: tune\n  steps: 3\n  lora:"
    with pytest.raises(UsageError, match=r"train\.lora is empty") as error:
        load_config(write("empty.yaml", COMPLETE.replace(old, new)))
    assert "the part would be off" in error.value.why
    assert load_config(write("none.yaml", COMPLETE.replace(old, f"{new} null"))).train.lora is None
    defaults = load_config(write("defaults.yaml", COMPLETE.replace(old, f"{new} {{}}"))).train.lora
    assert defaults is not None and defaults.rank == 16
