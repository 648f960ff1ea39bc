"""What a resume changed, key by key, and what the learning rate would have been."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from onellm_dist.config.load import load_config
from onellm_dist.config.schema import RunConfig
from onellm_dist.model.presets import build_meta_model
from onellm_dist.train.optim.rules import plan_parameters
from onellm_dist.train.records.config_changes import (
    KeyChange,
    append_history,
    find_changes,
    read_earlier_recipe,
)
from onellm_dist.train.records.events import Events
from onellm_dist.train.start.resume_changes import (
    TrainedParameters,
    compute_earlier_rates,
    write_changes,
)


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config("toy/align_image", [f"run.dir={tmp_path}", *overrides])


def dump(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(config.to_yaml())
    return found


@pytest.mark.parametrize(
    ("override", "key", "new"),
    [
        ("optim.lr=5e-3", "optim.lr", 5e-3),
        ("optim.betas=[0.8, 0.9]", "optim.betas", [0.8, 0.9]),
        ("train.precision=bf16", "train.precision", "bf16"),
        ("checkpoint.keep_every=7", "checkpoint.keep_every", 7),
        ("data.validation={split: x, samples: 1, every: 1}", "data.validation", None),
        ("track.with=[aim]", "track.with", ["aim"]),
        ("model.path=/m", "model.path", "/m"),
    ],
)
def test_each_changed_key_has_its_old_and_new_value(
    tmp_path: Path, override: str, key: str, new: object
) -> None:
    before, after = load(tmp_path), load(tmp_path, override)
    found = {change.key: change for change in find_changes(dump(before), after)}
    assert found.keys() == {key} | ({"model.preset"} if key == "model.path" else set())
    section, name = key.split(".")
    assert found[key].old == dump(before)[section][name]
    assert found[key].new == (dump(after)[section][name] if new is None else new)
    assert find_changes(dump(after), after) == []


def test_a_key_that_the_earlier_recipe_lacks_had_its_default(tmp_path: Path) -> None:
    before = dump(load(tmp_path))
    del before["checkpoint"]["keep"], before["launch"], before["optim"]["lr"]
    same = find_changes(before, load(tmp_path, "launch.ranks="))
    assert same == [], "a required key has no default"
    found = find_changes(before, load(tmp_path, "checkpoint.keep=9", "launch.ranks=3"))
    assert {(c.key, c.old, c.new) for c in found} == {
        ("checkpoint.keep", 2, 9),
        ("launch.ranks", None, 3),
    }


def test_secrets_are_neither_shown_nor_changes(tmp_path: Path) -> None:
    secret = "track.options={wandb: {api_key: abcdefgh12345}}"
    config = load(tmp_path, secret)
    assert find_changes(dump(config), config) == []
    (change,) = find_changes(dump(load(tmp_path)), config)
    assert "abcdefgh" not in str(change) and change.key == "track.options"


def test_old_values_are_masked_too(tmp_path: Path) -> None:
    """Version 0.1.0 wrote `config.yaml` without masks."""
    before = dump(load(tmp_path))
    before["track"]["options"] = {"wandb": {"api_key": "abcdefgh12345"}}
    before["data"]["root"] = "s3://me:abcdefgh12345@bucket"
    config = load(tmp_path)
    changes = find_changes(before, config)
    assert {c.key for c in changes} == {"track.options", "data.root"}
    assert "abcdefgh" not in "".join(map(str, changes))
    raw = KeyChange("track.options", before["track"]["options"], {"api_key": "abcdefgh54321"})
    append_history(tmp_path, 3, [*changes, raw, KeyChange("train.steps", 3, 4)])
    text = (tmp_path / "config_history.jsonl").read_text()
    assert "abcdefgh" not in text and text.count("***") >= 4
    assert json.loads(text)["changes"][-1] == {"key": "train.steps", "old": 3, "new": 4}


def test_another_runs_recipe_is_that_beside_its_checkpoint(tmp_path: Path) -> None:
    other, own = tmp_path / "other", tmp_path / "own"
    for folder, rate in ((other, "1e-4"), (own, "2e-4")):
        (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
        (folder / "config.yaml").write_text(load(folder, f"optim.lr={rate}").to_yaml())
    link = tmp_path / "latest"
    link.symlink_to(other / "checkpoints" / "step-00000003")
    earlier = read_earlier_recipe(own, link)
    assert earlier is not None and earlier["optim"]["lr"] == 1e-4
    keys = {c.key for c in find_changes(earlier, load(own, "checkpoint.resume=auto"))}
    assert keys == {"optim.lr"}, "another run.dir is not a change of the recipe"
    (other / "config.yaml").write_text("- not a recipe")
    assert read_earlier_recipe(own, link) is None


@cache
def build_toy() -> nn.Module:
    return build_meta_model("toy")


def make_trained(config: RunConfig) -> TrainedParameters:
    model = build_toy()
    plan = plan_parameters(model, config.train, config.optim, ("image",))
    return TrainedParameters(model, ("image",), plan.rates)


HEAD = "llm.lm_head.weight"
RATES = ("optim.lr=1e-3", "optim.min_lr=0", "optim.warmup_steps=0", "optim.schedule=cosine")


def test_the_rates_by_the_recipe_before_are_computed_or_unknown(tmp_path: Path) -> None:
    rules = "train.parameters=[{match: llm.lm_head.*, lr: 1e-4, schedule: constant}]"
    config = load(tmp_path, *RATES, "train.steps=10", "train.stage=tune", rules)
    trained, before = make_trained(config), dump(config)
    for step, body in ((5, 5e-4), (10, 0)):
        found = compute_earlier_rates(before, step, trained)
        assert found.keys() == trained.rates.keys() and len(found) > 10
        assert found == pytest.approx(
            {name: 1e-4 if name == HEAD else body for name in trained.rates}
        )
    before["optim"]["schedule"] = "gone"
    assert compute_earlier_rates(before, 5, trained) == {}
    assert compute_earlier_rates({}, 5, trained) == {}


@pytest.mark.parametrize(
    ("old", "new", "parameters", "rates"),
    [
        ("lr: 1e-4", "lr: 3e-4", 1, (5e-5, 1.5e-4)),
        ("lr: 1e-4", "schedule: constant", 1, (5e-5, 1e-3)),
        ("lr: 1e-4", "lr: 1.05e-4", 0, ()),
        ("lr: 1e-4", "freeze: true", 0, ()),
    ],
)
def test_a_jump_of_a_rules_rate_is_recorded(
    tmp_path: Path, old: str, new: str, parameters: int, rates: tuple[float, ...]
) -> None:
    """`optim.lr` stays: only what the rule of the head says changes."""
    before, now = (
        load(
            tmp_path,
            *RATES,
            "train.steps=10",
            "train.stage=tune",
            f"train.parameters=[{{match: llm.lm_head.*, {said}}}]",
        )
        for said in (old, new)
    )
    events = Events(tmp_path, enabled=True)
    earlier = dump(before)
    write_changes(events, now, find_changes(earlier, now), earlier, 5, make_trained(now))
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    jumps = [line for line in lines if line["event"] == "learning_rate_jump"]
    assert len(jumps) == bool(parameters) and len(lines) == 1 + len(jumps)
    for jump in jumps:
        assert (jump["old"], jump["new"]) == pytest.approx(rates)
        assert jump["parameters"] == parameters and jump["parameter"] == HEAD
