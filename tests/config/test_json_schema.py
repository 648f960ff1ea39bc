"""The JSON schema of recipes: an editor accepts what the loader accepts, and names what is wrong.

The documents are given to a validator as two YAML parsers see them: PyYAML (YAML 1.1), and one
that, as editors' do, reads YAML 1.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.common.resources import recipes_dir
from onellm_dist.config.json_schema import build_json_schema
from onellm_dist.config.keys import describe_keys
from onellm_dist.config.load import load_config
from onellm_dist.config.yaml_text import Plain, parse_yaml

SCHEMA = build_json_schema()
RECIPES = sorted(recipes_dir().rglob("*.yaml"))
COMPLETE = """\
model: {preset: toy}
data: {mixture: [{path: image}], global_batch: 8}
train: {stage: align, steps: 3}
optim: {lr: 1e-3}
"""


def list_properties(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every property of the schema by the name that `describe_keys` has."""
    for name, inner in schema.get("properties", {}).items():
        yield f"{prefix}{name}", inner
        for below, mark in ((inner, ""), (inner.get("items", {}), "[]")):
            for choice in (below, *below.get("anyOf", ())):
                if "$ref" in choice:
                    section = SCHEMA["$defs"][choice["$ref"].removeprefix("#/$defs/")]
                    yield from list_properties(section, f"{prefix}{name}{mark}.")


def read_as_editor(text: str) -> Any:
    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list):
            return [convert(item) for item in value]
        return value.free_value if isinstance(value, Plain) else value

    return convert(parse_yaml(text))


def find_errors(text: str) -> list[str]:
    """What a validator says about a recipe: one text for each reading of it that is wrong."""
    validator = jsonschema.Draft7Validator(SCHEMA)
    found = []
    for document in (yaml.safe_load(text), read_as_editor(text)):
        errors = [jsonschema.exceptions.best_match([e]) for e in validator.iter_errors(document)]
        lines = [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in errors]
        found += ["\n".join(lines)] if lines else []
    return found


def test_every_key_is_there_with_its_description() -> None:
    properties = dict(list_properties(SCHEMA))
    for key in describe_keys():
        assert properties[key.name]["description"] == key.description, key.name
    sections = properties.keys() - {key.name for key in describe_keys()}
    assert all(properties[name]["description"] and "." not in name for name in sections)


def test_only_known_keys_are_allowed() -> None:
    assert SCHEMA["additionalProperties"] is False
    for name, section in SCHEMA["$defs"].items():
        assert section["additionalProperties"] is False, name


def test_what_a_base_may_give_is_required_only_without_one() -> None:
    assert SCHEMA["if"] == {"required": ["base"]}
    without = SCHEMA["else"]
    assert set(without["required"]) == {"model", "data", "train", "optim"}
    assert without["properties"]["data"]["required"] == ["mixture", "global_batch"]
    assert "required" not in SCHEMA["$defs"]["DataSection"]
    assert SCHEMA["$defs"]["MixtureEntry"]["required"] == ["path"], "a list is complete"


def test_limits_and_choices_are_those_of_the_keys() -> None:
    properties = dict(list_properties(SCHEMA))
    assert properties["data.global_batch"]["exclusiveMinimum"] == 0
    assert properties["train.stage"]["enum"] == ["align", "tune", "joint", "custom"]
    assert properties["model.preset"]["enum"] == ["onellm-7b", "toy", "smollm2-135m", None]
    assert properties["optim.betas"]["minItems"] == 2
    assert properties["checkpoint.resume"]["anyOf"][0] == {"enum": ["auto", "never"]}


def test_the_schema_itself_is_valid() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(recipes_dir())))
@pytest.mark.seconds
def test_every_recipe_that_ships_is_accepted(path: Path) -> None:
    assert find_errors(path.read_text()) == []
    assert find_errors(load_config(path).to_yaml()) == [], "as a run records it"


@pytest.mark.parametrize(
    ("replaced", "by"),
    [
        ("steps: 3", "steps: 1_000"),
        ("steps: 3", "steps: 1e3"),
        ("steps: 3", "steps: '3'"),
        ("steps: 3", "steps: 007"),
        ("lr: 1e-3", "lr: .5"),
        ("lr: 1e-3", "lr: '1e-3'"),
        ("path: image", "path: 22_05"),
        ("path: image", "path: 21"),
        ("path: image", "path: on"),
        ("path: image", "path: 's3://bucket/x', weight: 3"),
        ("path: image", "path: '${SCRATCH}/x'"),
        ("global_batch: 8", "global_batch: 8, augment: yes"),
        ("global_batch: 8", "global_batch: 8, augment: OFF"),
        ("global_batch: 8", "global_batch: 8, augment: 1"),
        ("global_batch: 8", "global_batch: 8, root: ~"),
        ("global_batch: 8", "global_batch: 8, root: ~/data, cache_dir: null, exclude: '${HOME}/x'"),
        ("global_batch: 8", "global_batch: 8, validation: {split: val, samples: 4, every: 2}"),
        ("global_batch: 8", "global_batch: 8, validation: null"),
        ("preset: toy", "path: 22.05, preset: null"),
        ("lr: 1e-3", "lr: 1, options: {momentum: 0.9, any: [1, {x: null}]}"),
        ("lr: 1e-3", "lr: 1, betas: [0.5, 1e-3], decay_steps: null"),
        ("model:", "track: {with: [wandb], profile_steps: [1, 2], project: 3}\nmodel:"),
        ("model:", "checkpoint: {resume: never}\nmodel:"),
        ("model:", "checkpoint: {resume: runs/x/checkpoints/step-1, every_minutes: 1.5}\nmodel:"),
        ("model:", "run: {dir: 2024-01-01, seed: 0}\nmodel:"),
        (COMPLETE, "base: toy/align_image\noptim: {lr: 1e-3}\n"),
        (COMPLETE, "base: toy/align_image\n"),
        (COMPLETE, "base: toy/align_image\ndata: {mixture: [{path: imu}], validation: null}\n"),
    ],
)
def test_what_the_loader_accepts_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: str, by: str
) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    text = COMPLETE.replace(replaced, by)
    assert text != COMPLETE
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    load_config(recipe)
    errors = find_errors(text)
    # YAML 1.1 reads a date or a number of base 60 as one; JSON has neither.
    assert [e for e in errors if "datetime.date" not in e] == []


@pytest.mark.parametrize(
    ("replaced", "by", "word"),
    [
        ("model:", "optimm: {lr: 1}\nmodel:", "optimm"),
        ("steps: 3", "stepz: 3", "stepz"),
        ("path: image", "pth: image", "pth"),
        ("steps: 3", "steps: 0", "train.steps"),
        ("steps: 3", "steps: many", "train.steps"),
        ("steps: 3", "steps: 1.5", "train.steps"),
        ("stage: align", "stage: algn", "algn"),
        (", global_batch: 8", "", "global_batch"),
        ("optim: {lr: 1e-3}\n", "", "optim"),
        ("path: image", "path: image, weight: 0", "weight"),
        ("path: image", "path: [image]", "path"),
        ("[{path: image}]", "image", "data.mixture"),
        ("[{path: image}]", "[]", "data.mixture"),
        ("lr: 1e-3", "lr: -1", "optim.lr"),
        ("lr: 1e-3", "lr: 1e-3, betas: [0.9]", "optim.betas"),
        ("{lr: 1e-3}", "1e-3", "optim"),
        ("global_batch: 8", "global_batch: 8, augment: maybe", "data.augment"),
        ("global_batch: 8", "global_batch: 8, validation: {split: val, samples: 4}", "every"),
        ("preset: toy", "preset: toi", "toi"),
        (COMPLETE, "base: [a, b]\n", "base"),
        (COMPLETE, "base: toy/align_image\ntrain: {stepz: 3}\n", "stepz"),
        (COMPLETE, "base: toy/align_image\ndata: {mixture: [{weight: 3}]}\n", "path"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(
    tmp_path: Path, replaced: str, by: str, word: str
) -> None:
    text = COMPLETE.replace(replaced, by)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError):
        load_config(recipe)
    errors = find_errors(text)
    assert len(errors) == 2
    assert all(word in error for error in errors), errors
