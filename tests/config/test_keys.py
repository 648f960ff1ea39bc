"""The keys of a recipe as data: all listed, each explained."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import yaml

from onellm_dist.common.resources import recipes_dir
from onellm_dist.config.keys import REQUIRED, describe_keys, find_section, format_key_list
from onellm_dist.config.schema import DataSection, MixtureEntry, RunConfig, ValidationSection

KEYS = {key.name: key for key in describe_keys()}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.seconds
def test_every_key_has_a_description_that_says_something_alone(name: str) -> None:
    description = KEYS[name].description
    assert len(description.split()) >= 4, f"{name}: {description!r}"
    assert description[0].isupper() or description[0] == "`", f"{name}: {description!r}"
    assert description.endswith(".")
    assert "..." not in description.replace(", ...)", "")
    assert not re.match(r"(The same|Of |Also|And |\.\.\.)", description), f"{name}: {description!r}"


def test_every_section_has_a_description() -> None:
    assert [n for n, field in RunConfig.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("data.global_batch", "integer > 0 and <= 1048576", REQUIRED),
        ("data.cache_dir", "path or null", "null"),
        ("data.root", "path or URL", "."),
        ("data.pack_llm_tokens", "integer > 0 or auto", "4096"),
        ("data.mixture[].weight", "number > 0", "1.0"),
        ("data.text_format", "caption or conversation or chat", "caption"),
        ("data.augment", "true or false", "true"),
        ("data.validation", "section or null", "null"),
        ("data.validation.split", "text", REQUIRED),
        ("checkpoint.resume", "auto or never or path", "auto"),
        ("checkpoint.keep_every", "integer > 0 or null", "null"),
        ("optim.betas", "[number, number]", "[0.9, 0.95]"),
        ("track.with", "list of text", "[]"),
        ("track.underused_expert_share", "number >= 0 and <= 1", "0.05"),
    ],
)
def test_types_and_defaults_are_shown_as_people_write_them(
    name: str, kind: str, default: str
) -> None:
    assert (KEYS[name].type, KEYS[name].default) == (kind, default)


def _leaves(value: object, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _leaves(below, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for below in value:
            yield from _leaves(below, f"{prefix}[]")
    else:
        yield prefix


def test_every_key_of_the_recipes_is_listed() -> None:
    paths = sorted(recipes_dir().rglob("*.yaml"))
    assert len(paths) >= 9
    used = {key for path in paths for key in _leaves(yaml.safe_load(path.read_text()))}
    assert used <= KEYS.keys()


def test_sections_are_found_by_path() -> None:
    assert find_section(["data"]) is DataSection
    assert find_section(["data", "mixture", "3"]) is MixtureEntry
    assert find_section(["data", "validation"]) is ValidationSection
    assert find_section(["data", "workers"]) is None
    assert find_section(["nowhere", "below"]) is None


def test_the_list_has_a_line_for_every_key() -> None:
    lines = format_key_list().splitlines()
    assert [line.split()[0] for line in lines] == list(KEYS)
    (steps,) = (line for line in lines if line.startswith("train.steps "))
    assert steps.split(maxsplit=6)[1:-1] == ["integer", ">", "0", "or", "null"]
    assert steps.split()[6:] == ["null", "Optimizer", "steps", "of", "the", "whole", "run."]
    (stage,) = (line for line in lines if line.startswith("train.stage "))
    assert "required" in stage
