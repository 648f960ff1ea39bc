"""The included recipes: the paper's numbers, and each stage starts from the one before."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.common.resources import recipes_dir
from onellm_dist.config.load import load_config
from onellm_dist.config.schema import RunConfig
from onellm_dist.modalities import all_modalities
from onellm_dist.train.engine.deepspeed.config import load_ds_config
from onellm_dist.train.optim.schedules import compute_learning_rate

NAMES = sorted(
    str(path.relative_to(recipes_dir()).with_suffix("")) for path in recipes_dir().rglob("*.yaml")
)
STAGES = ["stage1_image", "stage2_video_audio_point", "stage3_all", "tune"]
GPU_KINDS = ["a100-80", "h100-80", "h200"]
PAPER: dict[str, dict[str, Any]] = {
    "stage1_image": {
        "batch": 5120,
        "rate": 5e-5,
        "least": 5e-6,
        "decay": 0.1,
        "samples": 128e6,
        "warmup": 2000 / 8,
    },
    "stage2_video_audio_point": {
        "batch": 1080,
        "rate": 1e-5,
        "least": 5e-6,
        "decay": 0.1,
        "samples": 13.5e6,
        "warmup": 2000 / 16,
    },
    "stage3_all": {
        "batch": 1080,
        "rate": 1e-5,
        "least": 5e-6,
        "decay": 0.1,
        "samples": 6.75e6,
        "warmup": 2000 / 16,
    },
    "tune": {
        "batch": 512,
        "rate": 2e-5,
        "least": 0.0,
        "decay": 0.0,
        "samples": 2.006e6,
        "warmup": 0.05 * 3918,
    },
}
"""Paper, appendix C and table 9; rates, warm-up and decay as its scripts have them."""


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_parses_and_names_a_configuration_that_exists(name: str) -> None:
    config = load_config(Path(name))
    assert config.engine.name == "fsdp" or load_ds_config(config.engine.config)
    assert "OPTIMIZER step" in (recipes_dir() / f"{name}.yaml").read_text() or name.startswith(
        ("toy/", "real/", *(f"{kind}/" for kind in GPU_KINDS))
    )


@pytest.mark.parametrize("kind", GPU_KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_for_a_gpu_changes_no_number_of_its_stage(kind: str, stage: str) -> None:
    """Micro-batches, recomputation and engine alone: what the planner searches."""
    raw = [load_config(Path(name)).model_dump() for name in (stage, f"{kind}/{stage}")]
    for config in raw:
        del config["engine"], config["train"]["activation_checkpointing"]
        del config["data"]["pack_llm_tokens"], config["data"]["pack_encoder_tokens"]
    assert raw[0] == raw[1]


@pytest.mark.soak
@pytest.mark.parametrize("kind", GPU_KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_for_a_gpu_fits_and_is_faster_than_its_base(kind: str, stage: str) -> None:
    machine = ["--nodes", "2", "--gpus-per-node", "8", "--gpu", kind, "model.preset=onellm-7b"]
    rates = []
    for name in (stage, f"{kind}/{stage}"):
        command = [str(Path(sys.executable).with_name("onellm")), "plan", name, *machine, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout)
        rates.append(found["samples_per_second"] if found["memory"]["fits"] else 0.0)
    assert rates[1] >= 1.02 * rates[0]


@pytest.mark.parametrize("name", STAGES)
def test_the_papers_runs_have_the_papers_figures(name: str) -> None:
    config, paper = load_config(Path(name)), PAPER[name]
    optim, steps = config.optim, config.train.steps
    assert config.data.global_batch == paper["batch"]
    assert (optim.lr, optim.min_lr, optim.weight_decay) == (
        paper["rate"],
        paper["least"],
        paper["decay"],
    )
    assert (optim.betas, optim.grad_clip, config.train.precision) == ((0.9, 0.95), 2.0, "bf16")
    assert steps * paper["batch"] == pytest.approx(paper["samples"], rel=0.001)
    assert optim.warmup_steps == pytest.approx(paper["warmup"], abs=1)
    rates = [compute_learning_rate(step, optim, steps) for step in range(steps)]
    assert max(rates) == pytest.approx(optim.lr) and rates[0] < optim.lr / 100
    if optim.decay_steps == steps:
        assert rates[-1] == pytest.approx(optim.min_lr, abs=1e-4 * optim.lr)


def test_each_stage_starts_from_the_model_of_the_one_before_and_names_what_is_new() -> None:
    runs: list[RunConfig] = [load_config(Path(name)) for name in STAGES]
    for before, after in pairwise(runs):
        assert after.model.path == before.run.dir / "model"
    assert [run.train.stage for run in runs] == ["align", "align", "align", "tune"]
    new = [set(run.model.init_from_image) for run in runs]
    first = next(iter(all_modalities()))
    assert set.union({first}, *new) == set(all_modalities())
    assert sum(map(len, new)) == len(all_modalities()) - 1, "each is new once"


def test_tuning_goes_through_every_dataset_once() -> None:
    config = load_config(Path("tune"))
    weights = [entry.weight for entry in config.data.mixture]
    samples = config.train.steps * config.data.global_batch
    assert [
        samples * weight / sum(weights) / (1000 * weight) for weight in weights
    ] == pytest.approx([1.0] * len(weights), abs=0.001)
