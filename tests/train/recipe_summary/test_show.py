"""`onellm train --show`: values with their places, what trains, first steps; nothing changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from stage_setup import freeze_for_stage, make_groups

from onellm_dist.common.checksums import seal
from onellm_dist.common.errors import EXIT_DONE, EXIT_USAGE, UsageError
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST, CHECKPOINTS
from onellm_dist.config.load import load_config
from onellm_dist.config.train_sections import OptimSection
from onellm_dist.data.plan import Plan
from onellm_dist.model.presets import load_model
from onellm_dist.model.weights.lazy import open_empty_model
from onellm_dist.shards.sources.toyworld.build import build_toyworld
from onellm_dist.train.checkpoint.folder import VERSION, make_checkpoint_name
from onellm_dist.train.optim.part_summary import summarise_parts
from onellm_dist.train.optim.parts import map_parts
from onellm_dist.train.recipe_summary.command import show_recipe
from onellm_dist.train.recipe_summary.first_steps import find_resumed

Show = Callable[..., list[str]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    build_toyworld(
        root, seed=0, train_per_modality=12, test_per_modality=2, modalities=("image", "imu")
    )
    return root


@pytest.fixture
def recipe(tmp_path: Path, toy: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: toy/align_image\n"
        f"run: {{dir: {tmp_path}/run}}\n"
        f"data:\n  root: {toy}\n  mixture: [{{path: image, weight: 3}}, {{path: imu}}]\n"
        "  global_batch: 8\n"
    )
    return path


@pytest.fixture
def show(recipe: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    def run(*overrides: str, code: int = EXIT_DONE) -> list[str]:
        assert show_recipe(recipe, overrides) == code
        return capsys.readouterr().out.splitlines()

    return run


def find_row(lines: list[str], first: str) -> list[str]:
    (row,) = (line.split() for line in lines if line.split()[:1] == [first])
    return row


def list_files(*folders: Path) -> dict[Path, int]:
    found = (path for folder in folders for path in folder.rglob("*"))
    return {path: path.stat().st_mtime_ns for path in found}


def count_tokens(recipe: Path) -> Plan:
    """The plan as a start opens it, which writes the token counts."""
    config = load_config(recipe)
    model, processor = open_empty_model(path=None, preset="toy")
    sizes = model.config.vision.patches, model.config.vision.prefix
    names = list(model.config.modalities)
    return Plan.open(config.data, processor.tokenizer, config.run.seed, names, sizes=sizes)


def test_every_value_has_its_place(show: Show, recipe: Path) -> None:
    lines = show("train.steps=5")
    assert f"Recipe {recipe}" in lines
    assert find_row(lines, "train.steps") == ["train.steps", "5", "command", "line"]
    assert find_row(lines, "data.global_batch")[1:] == ["8", f"{recipe}:6"]
    assert find_row(lines, "optim.warmup_steps")[2].endswith("toy/align_image.yaml:29")
    assert find_row(lines, "checkpoint.keep")[1:] == ["2", "default"]
    assert find_row(lines, "data.mixture[0]")[1:-1] == ["{path:", "image,", "weight:", "3.0}"]
    assert not any(line.startswith("data.validation.split") for line in lines)
    validated = show("data.validation={split: test, samples: 2, every: 1}")
    assert find_row(validated, "data.validation.split")[1] == "test"


def test_secrets_are_masked(show: Show) -> None:
    text = "\n".join(show("track.options={wandb: {api_key: Sw0rdf1sh}}"))
    assert "api_key: '***'" in text and "Sw0rdf1sh" not in text


def test_the_table_says_what_trains(show: Show) -> None:
    lines = show()
    model, _ = open_empty_model(path=None, preset="toy")
    freeze_for_stage(model, "align", {"image", "imu"})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert find_row(lines, "llm")[2:] == ["frozen", "-", "-"]
    assert find_row(lines, "audio")[2] == "frozen", "not in the mixture"
    assert find_row(lines, "imu")[3] == "0.002"
    total = sum(p.numel() for p in model.parameters())
    assert find_row(lines, "total") == ["total", f"{total:,}", f"{trained:,}"]
    tuned = show("train.stage=tune", "optim.weight_decay=0", "optim.lr=0.5")
    assert find_row(tuned, "upm")[2] == "frozen"
    assert find_row(tuned, "llm")[3:] == ["0.5", "0"]


@pytest.mark.parametrize(("stage", "encoder"), [("align", True), ("align", False), ("tune", False)])
def test_the_parts_add_up_to_the_optimizers_groups(stage: str, encoder: bool) -> None:
    model, _ = open_empty_model(path=None, preset="toy")
    plan = freeze_for_stage(model, stage, {"image"}, encoder=encoder, weight_decay=0.1)
    parts = summarise_parts(model, OptimSection(lr=1e-3, weight_decay=0.1), plan)
    groups = {g["weight_decay"]: g["params"] for g in make_groups(model, 0.1)}
    counts = {0.1: 0, 0.0: 0}
    for part in parts:
        for decay, count in part.decays:
            counts[decay] += count
    assert counts == {decay: sum(p.numel() for p in own) for decay, own in groups.items()}
    assert counts[0.0] > 0 and sum(p.trained for p in parts) == sum(counts.values())
    assert {p.part for p in parts} == set(map_parts(model).values())


def test_the_first_steps_are_those_of_the_plan(show: Show, recipe: Path) -> None:
    before = show()
    header = next(line for line in before if line.split()[:1] == ["step"])
    assert header.split()[:4] == ["step", "image", "imu", "samples"]
    assert find_row(before, "0") == ["0", "6", "2", "8", "?", "?"]
    assert any("a start first counts the tokens of 2 shards" in line for line in before)
    plan = count_tokens(recipe)
    after = show("launch.ranks=3")
    for step in range(3):
        planned = plan.step(step, 3)
        counts = [*planned.totals.samples_by_dataset, 8]
        sizes = [f"{planned.totals.llm_tokens:,}", str(len(planned.assigned[0]))]
        assert find_row(after, str(step)) == [str(step), *map(str, counts), *sizes]
        assert plan.count_samples(step) == planned.totals.samples_by_dataset
    assert any("(on 3 ranks)" in line for line in after)
    short = show("train.steps=1")
    assert find_row(short, "0") and not [line for line in short if line.split()[:1] == ["1"]]


def test_nothing_is_written_and_no_weight_is_read(
    show: Show, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path / "cache"))
    model, processor = load_model(path=None, preset="toy", seed=0)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    before = list_files(toy, tmp_path)
    lines = show(f"model.path={folder}")
    assert find_row(lines, "upm")[2] != "frozen"
    assert find_row(lines, "0")[:4] == ["0", "6", "2", "8"]
    assert list_files(toy, tmp_path) == before


def test_what_is_missing_is_said(show: Show, tmp_path: Path) -> None:
    lines = show(f"data.root={tmp_path}/nowhere", code=EXIT_USAGE)
    text = "\n".join(lines)
    assert "for all modalities of the model" in text
    assert "not shown: 2 problems in data.mixture" in text
    refused = lines[lines.index("A start would be refused:") :]
    assert len(refused) == 3 and f"{tmp_path}/nowhere/image" in refused[1]
    text = "\n".join(show(f"model.path={tmp_path}/nowhere", code=EXIT_USAGE))
    assert f"not shown: no model in {tmp_path}/nowhere" in text
    assert "the plan needs the model's modalities" in text
    text = "\n".join(show("checkpoint.resume=nowhere", code=EXIT_USAGE))
    assert "not shown: checkpoint.resume=nowhere: no complete checkpoint there" in text


def test_a_wrong_rule_is_a_start_that_would_be_refused(show: Show) -> None:
    text = "\n".join(show("train.parameters=[{match: upm.expert.*}]", code=EXIT_USAGE))
    assert "not shown: train.parameters: upm.expert.* matches no parameter" in text
    lines = show("train.parameters=[{match: 'upm.*', lr: 0.5}]", "train.epochs=1.5")
    assert find_row(lines, "upm")[3] == "0.5"
    assert any("length: 5 steps, 1.67 epochs of 24 samples" in line for line in lines)


@pytest.mark.seconds
def test_the_planner_has_its_say(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onellm_dist.planner.brief import describe_briefly

    assert show_recipe(recipe, (), describe_plan=describe_briefly) == EXIT_DONE
    said = capsys.readouterr().out.partition("\nPlan\n")[2]
    assert "fits: " in said and "s a step" in said and "hours" in said
    refused = describe_briefly(recipe, ["data.pack_llm_tokens=4"])
    assert len(refused) == 1 and refused[0].startswith("  not planned: ")


def test_a_wrong_recipe_is_refused(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean train\.steps"):
        show_recipe(recipe, ["train.stepz=1"])


def save_checkpoint(run_dir: Path, plan: Plan, steps_done: int) -> Path:
    """A checkpoint of no parameters."""
    folder = run_dir / CHECKPOINTS / make_checkpoint_name(steps_done)
    folder.mkdir(parents=True)
    phases = [data_phase.to_json() for data_phase in plan.data_phases]
    manifest = {
        "version": VERSION,
        "steps_done": steps_done,
        "files": {},
        "sha256": {},
        "data_phases": phases,
    }
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(seal(manifest)))
    return folder


@pytest.mark.seconds
def test_a_run_is_shown_from_where_it_would_resume(
    show: Show, recipe: Path, tmp_path: Path
) -> None:
    assert find_resumed(load_config(recipe)) is None
    folder = save_checkpoint(tmp_path / "run", count_tokens(recipe), 5)
    (tmp_path / "run" / CHECKPOINTS / make_checkpoint_name(6)).mkdir()  # is not complete
    assert find_resumed(load_config(recipe)) == folder
    lines = show("train.steps=7")
    assert any(f"after {folder} (5 steps done)" in line for line in lines)
    assert find_row(lines, "5")[1:4] == ["6", "2", "8"] and find_row(lines, "6")
    anew = show("train.steps=7", "checkpoint.resume=never")
    assert find_row(anew, "0") and find_row(show(f"checkpoint.resume={folder}"), "5")
    assert any("none: all 5 steps are done" in line for line in show("train.steps=5"))
    changed = "\n".join(show("data.mixture=[{path: image}, {path: imu}]", code=EXIT_USAGE))
    assert "not shown: the recipe's data is not that of the checkpoint at step 5" in changed
    new_phase = show("data.mixture=[{path: image}, {path: imu}]", "data.new_phase=true")
    assert find_row(new_phase, "5")[1:4] == ["4", "4", "8"]
