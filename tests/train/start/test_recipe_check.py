"""What a recipe names is looked for before the ranks begin, as the run itself will look for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from onellm_dist.common.errors import UsageError
from onellm_dist.common.run_files import CHECKPOINTS
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.train.checkpoint.folder import make_checkpoint_name
from onellm_dist.train.records.applied_resumes import record_applied
from onellm_dist.train.start.recipe_check import load_checked_config


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    with DatasetWriter(folder, name="texts", modalities=()) as writer:
        writer.add("train", "only", {"txt": b"a caption"})
    return folder


def write_recipe(dataset: Path) -> Path:
    """A recipe beside the dataset, with `run.dir` there too."""
    folder = dataset.parent
    recipe = {
        "run": {"dir": str(folder / "run")},
        "model": {"preset": "toy"},
        "data": {"root": str(folder), "mixture": [{"path": dataset.name}], "global_batch": 1},
        "train": {"stage": "align", "steps": 1},
        "optim": {"lr": 1.0},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def test_a_dataset_of_links_is_taken_if_the_recipe_says_so(dataset: Path) -> None:
    (dataset / "shards").rename(dataset.parent / "elsewhere")
    (dataset / "shards").symlink_to(dataset.parent / "elsewhere")
    recipe = write_recipe(dataset)
    with pytest.raises(UsageError, match=r"leads out of the folder(.|\n)*data\.follow_links=true"):
        load_checked_config(recipe)
    assert load_checked_config(recipe, ["data.follow_links=true"]).data.follow_links


def test_a_requeued_job_may_have_removed_the_checkpoint_that_it_began_with(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run_dir = write_recipe(dataset), dataset.parent / "run"
    wanted = run_dir / CHECKPOINTS / make_checkpoint_name(1000)
    command = [f"checkpoint.resume={wanted}"]
    run_dir.mkdir()
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    record_applied(run_dir, wanted, os.environ)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert load_checked_config(recipe, command).checkpoint.resume == wanted
    with pytest.raises(UsageError, match="no such folder"):
        load_checked_config(recipe, [f"checkpoint.resume={wanted}x"])
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    with pytest.raises(UsageError, match="no such folder"):
        load_checked_config(recipe, command)


def test_what_cannot_be_compiled_or_rounded_is_refused_before_the_ranks_begin(
    dataset: Path,
) -> None:
    recipe, compiled = write_recipe(dataset), "train.compile=blocks"
    with pytest.raises(UsageError, match=r"train\.compile=blocks under DeepSpeed ZeRO-3"):
        load_checked_config(recipe, [compiled])
    load_checked_config(recipe, [compiled, "engine.config=zero2"])
    rounded = "engine.frozen_weights=int8"
    with pytest.raises(UsageError, match=r"train\.compile=blocks with engine\.frozen_weights=int8"):
        load_checked_config(recipe, [compiled, rounded, "engine.config=zero2"])
    with pytest.raises(UsageError, match=r"int8 with train\.stage=tune and without"):
        load_checked_config(recipe, [rounded, "train.stage=tune"])


def test_everything_wrong_is_named_at_once(dataset: Path, tmp_path: Path) -> None:
    recipe = write_recipe(dataset)
    wrong = [
        "train.setps=4",
        "train.steps=many",
        "data.workers=-1",
        'data.mixture=[{path: texts}, {path: lost}, {path: texts, weight: "heavy"}]',
        f"model.path={tmp_path}/no_model",
        f"engine.config={tmp_path}/no.json",
        f"checkpoint.resume={tmp_path}/step-9",
        "train.callbacks=[no_such_module:Callback]",
        "track.with=[nope]",
        "engine.ranks_in_a_rack=3",
        f"run.dir={recipe}",
    ]
    with pytest.raises(UsageError) as caught:
        load_checked_config(recipe, wrong)
    for named in (
        "unknown key train.setps; did you mean train.steps?",
        "train.steps: ",
        "data.workers: ",
        "data.mixture.2.weight: ",
        f"{tmp_path}/lost",
        f"model.path={tmp_path}/no_model: no such folder",
        "no.json",
        "checkpoint.resume=",
        "no_such_module",
        "track.with: 'nope' is not a tracker",
        "unknown key engine.ranks_in_a_rack",
        "run.dir=",
    ):
        assert named in str(caught.value)


def test_what_a_misspelled_key_may_have_meant_is_not_looked_for(dataset: Path) -> None:
    """Under the default of `data.root` the dataset is missing, which is not a fault."""
    recipe = write_recipe(dataset)
    values = json.loads(recipe.read_text())
    values["data"]["rot"] = values["data"].pop("root")
    recipe.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="1 problem in") as caught:
        load_checked_config(recipe)
    assert "did you mean data.root?" in str(caught.value)


def find_problems_of(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_checked_config(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize("key", ["with", "trackers"])
def test_wrong_trackers_are_named_beside_another_wrong_key_of_their_section(
    dataset: Path, key: str
) -> None:
    recipe = write_recipe(dataset)
    problems = find_problems_of(recipe, f"track.{key}=[nope]", "track.projekt=x")
    assert "did you mean track.project?" in problems and "'nope' is not a tracker" in problems


@pytest.mark.parametrize("second", ["nope2", "aim"])
def test_trackers_under_both_names_are_not_looked_for(dataset: Path, second: str) -> None:
    recipe = write_recipe(dataset)
    values = json.loads(recipe.read_text())
    values["track"] = {"with": ["nope"], "trackers": [second]}
    recipe.write_text(json.dumps(values))
    problems = find_problems_of(recipe)
    assert "track.with and track.trackers are one key" in problems and "1 problem in" in problems


def test_a_tracker_whose_key_may_be_misspelled_is_not_looked_for(dataset: Path) -> None:
    problems = find_problems_of(write_recipe(dataset), "track.with=[nope]", "track.wiht=[tensor]")
    assert "did you mean track.with?" in problems and "1 problem in" in problems
    problems = find_problems_of(write_recipe(dataset), "track.with=[nope]", "track.tracker=[aim]")
    assert "did you mean track.with?" in problems and "1 problem in" in problems


def test_the_engine_is_checked_with_the_precision_that_the_recipe_names(dataset: Path) -> None:
    """Without ZeRO, bf16 is refused."""
    recipe, config = write_recipe(dataset), dataset.parent / "zero0.json"
    config.write_text('{"zero_optimization": {"stage": 0}}')
    engine = f"engine.config={config}"
    load_checked_config(recipe, [engine, "train.precision=fp32"])
    problems = find_problems_of(recipe, engine, "train.precision=fp32", "train.stepz=2")
    assert "did you mean train.steps?" in problems and "1 problem in" in problems
    problems = find_problems_of(recipe, engine, "train.precison=fp32")
    assert "did you mean train.precision?" in problems and "1 problem in" in problems
    problems = find_problems_of(recipe, engine, "train.stepz=2")
    assert "stage 0 with train.precision=bf16" in problems and "2 problems in" in problems


RULE = "train.parameters=[{match: 'llm.*', schedule: wsd}]"
"""A rule whose schedule reads `optim.decay_from`."""


@pytest.mark.parametrize(
    "wrong",
    [
        "train.stepz=2",
        "train.precision=fp8",
        "trian.steps=4",
        "train.parameters=[{match: 'llm.*', schedule: wsd, lrr: 1}]",
        "train.epoch=3",
        "train.schedule=wsd",
        "schedule=wsd",
    ],
)
def test_a_schedule_is_checked_with_the_rules_and_steps_that_are_known(
    dataset: Path, wrong: str
) -> None:
    recipe, decay = write_recipe(dataset), "optim.decay_from=50"
    load_checked_config(recipe, ["train.steps=100", RULE, decay])
    assert "1 problem in" in find_problems_of(recipe, "train.steps=100", RULE, decay, wrong)


def test_a_wrong_schedule_is_named_beside_a_wrong_key_of_train(dataset: Path) -> None:
    recipe, wrong = write_recipe(dataset), "train.colour=2"
    problems = find_problems_of(recipe, "optim.decay_from=50", "train.steps=100", wrong)
    assert "is read by optim.schedule=wsd alone" in problems and "2 problems in" in problems
    problems = find_problems_of(recipe, "optim.decay_from=50", RULE, "train.steps=40", wrong)
    assert "is not below train.steps=40" in problems and "2 problems in" in problems


@pytest.mark.parametrize("wrong", ["run.dri=x", "dir=x", "train.dir=x", "rnu.dir=x", "run.dir="])
def test_a_checkpoint_that_may_have_been_applied_is_not_missed(dataset: Path, wrong: str) -> None:
    """Whether it was, the run directory says, which is not known."""
    lost = f"checkpoint.resume={dataset}/step-9"
    assert "1 problem in" in find_problems_of(write_recipe(dataset), lost, wrong)
    assert "2 problems in" in find_problems_of(write_recipe(dataset), lost, "run.colour=red")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("precision=fp32", "train.precision"),
        ("engine.precision=fp32", "train.precision"),
        ("train.dtype=fp32", "train.precision"),
        ("dtype=fp32", "train.precision"),
        ("hardware.precision=fp32", ""),
        ("root=/data", "data.root"),
        ("run.root=/data", "data.root"),
        ("data.folder=/data", ""),
        ("backend=fsdp", "engine.name"),
        ("train.engine.name=fsdp", "engine"),
        ("train.name=fsdp", "engine.name"),
        ("engine.compile=none", "train.compile"),
    ],
)
def test_a_key_in_the_wrong_place_is_found_and_its_default_is_not_used(
    dataset: Path, wrong: str, meant: str
) -> None:
    """Under its default, one of these would be wrong, too: each is right as the user meant it."""
    recipe, config = write_recipe(dataset), dataset.parent / "zero0.json"
    values = json.loads(recipe.read_text())
    if wrong.endswith("/data"):
        del values["data"]["root"]
    elif wrong == "engine.compile=none":
        values["train"]["compile"] = "blocks"
    else:
        config.write_text('{"zero_optimization": {"stage": 0}}')
        values["engine"] = {"config": str(config)}
    recipe.write_text(json.dumps(values))
    problems = find_problems_of(recipe, wrong)
    assert "1 problem in" in problems
    assert ("did you mean" in problems) == bool(meant)
    assert f"unknown key {wrong.partition('=')[0].replace('.name', '')}" in problems or not meant
    assert not meant or f"did you mean {meant}?" in problems


def test_a_key_with_dots_in_a_file_is_explained(dataset: Path) -> None:
    recipe = write_recipe(dataset)
    values = json.loads(recipe.read_text())
    values["engine.name"] = "fsdp"
    values["train"]["compile"] = "blocks"  # refused under the default engine
    recipe.write_text(json.dumps(values))
    problems = find_problems_of(recipe)
    assert "engine.name is written as one key with a dot" in problems and "1 problem in" in problems


def test_a_section_whose_name_is_misspelled_is_not_checked_with_its_defaults(dataset: Path) -> None:
    """`train.compile=blocks` is refused under the default engine alone."""
    problems = find_problems_of(write_recipe(dataset), "engin.name=fsdp", "train.compile=blocks")
    assert "did you mean engine?" in problems and "1 problem in" in problems
