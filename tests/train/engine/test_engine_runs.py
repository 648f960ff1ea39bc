"""Runs that change engine and number of ranks between checkpoints.

Also what they export, and what their checkpoints convert to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_onellm import get_small_keys
from toy_runs import Runs

from onellm_dist.common.checksums import SUMS
from onellm_dist.convert.conversion import convert
from onellm_dist.model.card import CARD

pytestmark = pytest.mark.slow
STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Four runs, each of the last three from a checkpoint of the one before.

    ZeRO-3 on 4 ranks; FSDP2 on 3 ranks; FSDP2 on 2 ranks; ZeRO-2 on 1 rank.
    """
    made = Runs(
        tmp_path_factory.mktemp("engines"),
        ("image", "imu"),
        16,
        train__steps=STEPS,
        data__global_batch=4,
        checkpoint__every=1,
        checkpoint__keep=20,
        data__validation="{split: test_seen, samples: 4, every: 2}",
        **get_small_keys(),
    )
    made.run("zero3_4", 4, engine__config="cpu")
    made.run("fsdp_3", 3, engine__name="fsdp", checkpoint__resume=made.step("zero3_4", 1))
    made.run(
        "fsdp_2",
        2,
        engine__name="fsdp",
        engine__reduce_every="step",
        checkpoint__resume=made.step("fsdp_3", 2),
        train__activation_checkpointing="full",
    )
    made.run("zero2_1", 1, engine__config="zero2", checkpoint__resume=made.step("fsdp_2", 3))
    return made


@pytest.mark.parametrize(("name", "first"), [("fsdp_3", 1), ("fsdp_2", 2), ("zero2_1", 3)])
def test_a_run_resumes_under_another_engine_with_the_same_numbers(
    runs: Runs, name: str, first: int
) -> None:
    there, here = runs.metrics("zero3_4"), runs.metrics(name)
    assert sorted(here) == list(range(first, STEPS))
    for step, line in here.items():
        assert line["sample_digest"] == there[step]["sample_digest"]
        assert line["loss"] == pytest.approx(there[step]["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(there[step]["grad_norm"], rel=1e-3)
        assert line["grad_norm_by_part"] == pytest.approx(
            there[step]["grad_norm_by_part"], rel=1e-3
        )
        assert set(line["grad_norm_by_part"]) == {"image", "imu", "upm"}
    validations = [
        runs.metrics(n, "validation.jsonl", "steps_done")[STEPS]["loss"] for n in ("zero3_4", name)
    ]
    assert validations[0] == pytest.approx(validations[1], rel=1e-4)


@pytest.mark.parametrize("name", ["zero3_4", "fsdp_3"])
def test_a_checkpoint_converts_to_what_the_run_gathered(
    runs: Runs, name: str, tmp_path: Path
) -> None:
    """`onellm convert` gives the weights that the run exported (ZeRO-3 on 4 ranks, FSDP2 on 3)."""
    opened, _ = convert("run", runs.root / name, tmp_path / "out", quiet=True)
    exported, found = (
        load_file(folder / "model.safetensors")
        for folder in (runs.root / name / "model", tmp_path / "out")
    )
    assert opened.notes["world size"] == int(name[-1])
    assert exported.keys() == found.keys()
    assert all(
        torch.equal(exported[n], found[n]) and exported[n].dtype == found[n].dtype for n in exported
    )


def test_the_export_is_what_save_pretrained_writes(runs: Runs, tmp_path: Path) -> None:
    from onellm_dist.model.presets import load_model

    folder = runs.root / "fsdp_3" / "model"
    model, processor = load_model(path=folder, preset=None, seed=0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in folder.iterdir()} == written | {CARD, SUMS}
    ours, theirs = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    for name in ("config.json", "generation_config.json"):
        assert without_inner_dtypes(folder / name) == without_inner_dtypes(tmp_path / name)


def without_inner_dtypes(path: Path) -> dict[str, Any]:
    """Loading a model writes its dtype into the configs of its parts too."""
    found = json.loads(path.read_text())
    return {
        key: {k: v for k, v in value.items() if k != "dtype"} if isinstance(value, dict) else value
        for key, value in found.items()
    }
