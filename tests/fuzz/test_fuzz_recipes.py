"""Mutated recipes, overrides and DeepSpeed JSONs: what was written, or a refusal in words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import fuzz, replay
from mutators import STRINGS, mutate_any, mutate_bytes, mutate_json, mutate_lines, mutate_value

from onellm_dist.common.resources import ds_configs_dir, recipes_dir
from onellm_dist.common.secrets import MASK
from onellm_dist.config.load import find_run_dir, load_config
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.train.engine.deepspeed.config import complete_config, load_ds_config
from onellm_dist.train.start.recipe_check import load_checked_config

Surface = Callable[[bytes], None]
ODD_YAML = (
    "yes",
    "off",
    "~",
    "1_000",
    "0o17",
    "12:30:00",
    "8e42137",
    ".inf",
    "-.nan",
    "1e400",
    "9" * 5000,
    "!!binary abc",
    "!!python/object:os.system x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!int x",
    "!<tag:x> y",
    "&a [*a]",
    "*missing",
    "{<<: 3}",
    "{<<: [1]}",
    "? [a]\n: b",
    "|\n  x",
    ">-\n  x",
    "'",
    '"\\x"',
    "[",
    "{a: b",
    "%",
    "@",
    "`",
    "\t",
    "2024-01-01",
    "{1: 2, [3]: 4}",
    "--- x",
    "...",
    "&x {a: &y [1, 1], b: *y}",
    "[" * 60 + "]" * 60,
    "[" * 3000,
    "=",
    "<<",
    "${NOWHERE}/x",
    "~no/x",
)
"""Scalars and structures of YAML that a key does not expect."""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


def mutate_yaml(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change values of a recipe, and put odd YAML in place of one of its scalars."""
    value = yaml.safe_load(rng.choice(seeds))
    for _ in range(rng.choice((0, 1, 1, 2))):
        value = mutate_value(rng, value)
    text = str(yaml.safe_dump(value, sort_keys=False, default_flow_style=rng.random() < 0.2))
    lines = text.split("\n")
    action = rng.randrange(6)
    at = rng.randrange(len(lines))
    if action <= 2:
        head, colon, _ = lines[at].partition(": ")
        odd = rng.choice((*ODD_YAML, *STRINGS))
        lines[at] = f"{head}{colon or ': '}{odd}"
    elif action == 3:
        lines.insert(at, rng.choice(lines))
    elif action == 4 and rng.random() < 0.1:
        lines.insert(0, BOMB)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A recipe in which every section has keys, and whose files exist."""
    with DatasetWriter(tmp_path / "texts", name="texts", modalities=()) as writer:
        writer.add("train", "only", {"txt": b"a caption"})
    (tmp_path / "exclude.txt").write_text("texts/train-000000/only\n")
    return {
        "run": {"dir": str(tmp_path / "run"), "seed": 3},
        "model": {"preset": "toy", "init_from_image": []},
        "data": {
            "root": str(tmp_path),
            "mixture": [{"path": "texts", "weight": 2.5}],
            "global_batch": 8,
            "exclude": str(tmp_path / "exclude.txt"),
            "validation": {"split": "train", "samples": 1, "every": 5},
        },
        "train": {"stage": "align", "steps": 30, "precision": "fp32", "callbacks": []},
        "optim": {"name": "sgd", "options": {"momentum": 0.9}, "lr": 1e-3, "betas": [0.9, 0.95]},
        "engine": {"name": "deepspeed", "config": "zero2"},
        "checkpoint": {"every": 10, "keep_every_hours": 1.5, "resume": "auto"},
        "track": {"with": [], "options": {"wandb": {"name": "x", "tags": ["a", 1, None]}}},
        "stability": {"policy": "skip", "window": 16},
        "launch": {"ranks": 2},
    }


def make_recipe_surface(folder: Path) -> Surface:
    """Read a recipe; what a run would write as `config.yaml` is the same recipe."""
    path, again = folder / "recipe.yaml", folder / "config.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        find_run_dir(path, [])
        config = load_checked_config(path)
        text = config.to_yaml()
        again.write_text(text, encoding="utf-8")
        if MASK not in text:
            assert repr(load_config(again)) == repr(config), "config.yaml is another recipe"

    return read


def make_override_surface(recipe: Path) -> Surface:
    def read(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")  # as Python reads its command line
        find_run_dir(recipe, [text])
        load_config(recipe, [text]).to_yaml()

    return read


OVERRIDES = [
    b"train.steps=10",
    b"data.mixture=[{path: texts, weight: 1}, {path: b, weight: 2}]",
    b"run.dir=/x/a b #3",
    b"optim.options={momentum: 0.5}",
    b"track.options.wandb.name=8e42137",
    b"optim.betas=[0.9, 0.99]",
    b"checkpoint.resume=never",
    b"data.validation=",
]


def mutate_override(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Give another key, or another value, to an override."""
    key, _, value = rng.choice(seeds).partition(b"=")
    if rng.random() < 0.3:
        key = rng.choice(seeds).partition(b"=")[0] + rng.choice((b"", b".x", b".", b"..y", b"[0]"))
    new: bytes = rng.choice((*ODD_YAML, *STRINGS)).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        new = mutate_bytes(rng, [value or b"x"])
    return key + b"=" + new


def run_recipes(tmp_path: Path, recipe: dict[str, Any], cases: int) -> None:
    surface = make_recipe_surface(tmp_path)
    based = {**recipe, "base": "toy/align_image"}
    seeds = [yaml.safe_dump(r, sort_keys=False).encode() for r in (recipe, based)]
    seeds.append(json.dumps(recipe).encode())
    mutate = mutate_any(mutate_yaml, mutate_yaml, mutate_lines, mutate_bytes)
    fuzz("recipe", surface, seeds, mutate, cases=cases).require_clean()


def run_overrides(tmp_path: Path, cases: int) -> None:
    surface = make_override_surface(recipes_dir() / "toy" / "align_image.yaml")
    mutate = mutate_any(mutate_override, mutate_override, mutate_bytes)
    fuzz("override", surface, OVERRIDES, mutate, cases=cases).require_clean()


DS_SEEDS = [
    *(path.read_bytes() for path in sorted(ds_configs_dir().glob("*.json"))),
    json.dumps(
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "ratio": 1.0},
                "offload_param": None,
                "zero_hpz_partition_size": 2,
            },
            "data_types": {"grad_accum_dtype": "fp32"},
            "timers": {"throughput": {"enabled": True, "synchronized": False}},
            "communication_data_type": "fp32",
            "comms_logger": {"enabled": False, "verbose": False},
            "activation_checkpointing": {"partition_activations": False},
            "wall_clock_breakdown": False,
            "steps_per_print": 100,
        }
    ).encode(),
]


def make_deepspeed_surface(folder: Path) -> Surface:
    """Read a DeepSpeed JSON as a start does: our own check, then DeepSpeed's."""
    from onellm_dist.train.engine.deepspeed.engine import import_deepspeed
    from onellm_dist.train.engine.deepspeed.library_check import check_with_deepspeed

    import_deepspeed()
    path = folder / "ds.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        config = load_ds_config(path)
        check_with_deepspeed(complete_config(config, bf16=True, grad_clip=1.0))

    return read


def run_deepspeed(tmp_path: Path, cases: int) -> None:
    mutate = mutate_any(mutate_json, mutate_json, mutate_bytes)
    surface = make_deepspeed_surface(tmp_path)
    seeds = [seed for seed in DS_SEEDS if b'"stage": 0' not in seed]
    fuzz("deepspeed", surface, seeds, mutate, cases=cases).require_clean()


@pytest.mark.seconds
def test_mutated_recipes(tmp_path: Path, recipe: dict[str, Any]) -> None:
    run_recipes(tmp_path, recipe, 60)
    replay("recipe", make_recipe_surface(tmp_path))


@pytest.mark.seconds
def test_mutated_overrides(tmp_path: Path) -> None:
    run_overrides(tmp_path, 150)


@pytest.mark.slow
def test_mutated_deepspeed_jsons(tmp_path: Path) -> None:
    run_deepspeed(tmp_path, 300)
    replay("deepspeed", make_deepspeed_surface(tmp_path))


@pytest.mark.soak
def test_mutated_recipes_for_hours(tmp_path: Path, recipe: dict[str, Any]) -> None:
    run_recipes(tmp_path, recipe, 10_000)
    run_overrides(tmp_path, 10_000)
    run_deepspeed(tmp_path, 10_000)
