"""Real runs of DPO: they learn what is preferred, survive kills, and leave what others leave."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_worlds import write_pairs
from safetensors.torch import load_file
from toy_runs import Runs
from zygote import get_zygote

from onellm_dist.model.presets import load_model
from onellm_dist.train.checkpoint.folder import read_manifest
from onellm_dist.train.records.json_lines import read_lines
from onellm_dist.train.totals import REWARDS

pytestmark = pytest.mark.slow
STEPS = 8
ENGINES: dict[str, dict[str, Any]] = {
    "zero2": {"engine__name": "deepspeed", "engine__config": "zero2"},
    "zero3": {"engine__name": "deepspeed", "engine__config": "zero3"},
    "fsdp": {"engine__name": "fsdp", "engine__config": ""},
}
REFERENCES: dict[str, dict[str, Any]] = {
    "adapter": {
        "train__stage": "tune",
        "train__lora": "{rank: 4, alpha: 8, targets: [llm.*, upm.*]}",
        "train__dpo": "{beta: 0.2}",
    },
    "copy": {"train__stage": "joint", "train__dpo": "{beta: 0.2, reference: copy}"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(
        tmp_path_factory.mktemp("preferences"),
        ("image",),
        2,
        data__mixture="[{path: pairs, weight: 1}]",
        data__global_batch=4,
        data__text_format="conversation",
        data__max_text_tokens=120,
        data__preference_pairs="true",
        data__validation="{split: test, samples: 16, every: 4}",
        train__loss="dpo",
        train__steps=STEPS,
        checkpoint__every=2,
        checkpoint__keep=20,
        checkpoint__asynchronous=False,
    )
    write_pairs(made.root / "toy", splits={"train": 40, "test": 16}, broken=[5])
    return made


def compute_gap(runs: Runs, name: str, reference: str) -> float:
    """Relative difference of the update of all weights."""
    start, _ = load_model(path=None, preset="toy", seed=0)
    before, here, there = start.state_dict(), runs.exported(name), runs.exported(reference)
    gap = sum(float((here[n] - there[n]).double().square().sum()) for n in there)
    update = sum(float((there[n] - before[n]).double().square().sum()) for n in there)
    assert update > 0
    return math.sqrt(gap / update)


def check_run(runs: Runs, name: str, kind: str) -> None:
    lines, folder = runs.metrics(name), runs.root / name
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert all(line[metric] is not None for line in lines.values() for metric in REWARDS)
    for line in lines.values():
        margin = line["rewards_chosen"] - line["rewards_rejected"]
        assert line["rewards_margin"] == pytest.approx(margin, abs=1e-6)
        assert 0 <= line["rewards_accuracy"] <= 1 and set(line["loss_by_modality"]) == {"image"}
    assert lines[STEPS - 1]["rewards_margin"] > 0
    manifest = read_manifest(runs.step(name, STEPS))
    assert manifest is not None and manifest["reference"] == kind
    assert not any(n.startswith("reference.") for n in manifest["parameters"])
    assert not any(
        n.startswith("reference.") for n in load_file(folder / "model/model.safetensors")
    )
    start = next(e for e in read_lines(folder / "events.jsonl") if e["event"] == "start")
    parts = {part["part"]: part for part in start["parameters"]}
    assert ("reference" in parts) == (kind == "copy")
    if kind == "copy":
        assert parts["reference"]["trained"] == 0
    assert (folder / "adapter").is_dir() == (kind == "adapter")


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_run_learns_what_is_preferred(runs: Runs, kind: str) -> None:
    """Of 16 held-out pairs, one rank; the picture of one trained pair is broken."""
    name = f"learns-{kind}"
    keys = {**REFERENCES[kind], **ENGINES["fsdp"], "launch__ranks": 1}
    folder = runs.run(name, 1, **keys)
    check_run(runs, name, kind)
    found = [line for line in read_lines(folder / "validation.jsonl") if "loss" in line]
    assert [line["steps_done"] for line in found] == [4, 8]
    assert found[-1]["loss"] < found[0]["loss"] < math.log(2)
    assert found[-1]["rewards_accuracy"] >= 0.9
    assert found[-1]["rewards_margin"] > found[0]["rewards_margin"] > 0


@pytest.mark.soak
def test_accuracy_rises_on_held_out_pairs(runs: Runs) -> None:
    """Of 64 pairs of random words, in which a single word says what is preferred."""
    write_pairs(
        runs.root / "toy", "noisy", splits={"train": 400, "test": 64}, modalities=(), noisy=True
    )
    keys = {**REFERENCES["adapter"], "optim__lr": 1e-3, "train__steps": 48}
    keys["data__mixture"] = "[{path: noisy, weight: 1}]"
    keys["data__validation"] = "{split: test, samples: 64, every: 1}"
    folder = runs.run("rises", 1, **keys, **ENGINES["fsdp"])
    found = [line for line in read_lines(folder / "validation.jsonl") if "loss" in line]
    accuracies = [line["rewards_accuracy"] for line in found]
    print(f"accuracy on held-out pairs: {accuracies}")
    first, last = (sum(some) / len(some) for some in (accuracies[:4], accuracies[-4:]))
    assert last > 0.9 and last > first + 0.1
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]


def kill(runs: Runs, name: str, ranks: int, keys: dict[str, Any]) -> None:
    """Start a run, which is killed in its fourth step."""
    line = runs.overrides(name, **{"launch__ranks": ranks, **keys})
    started = get_zygote().start(ranks, line, {"kill": 3}, recipe=runs.recipe)
    assert set(started.wait()) == {-9}, started.output()


@pytest.mark.soak
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", REFERENCES)
def test_a_killed_run_ends_as_one_that_was_not(runs: Runs, kind: str, engine: str) -> None:
    """At its size bit for bit; at others, and under the other engines, with the same numbers."""
    keys, name = {**REFERENCES[kind], **ENGINES[engine]}, f"{kind}-{engine}"
    runs.run(name, 2, **keys)
    check_run(runs, name, kind)
    kill(runs, f"{name}-same", 2, keys)
    runs.run(f"{name}-same", 2, **keys)
    expected, found = runs.metrics(name), runs.metrics(f"{name}-same")
    assert sorted(found) == sorted(expected) == list(range(STEPS))
    for step, line in found.items():
        for field in ("sample_digest", "loss", "grad_norm", *REWARDS):
            assert line[field] == expected[step][field], (step, field)
    there = runs.exported(name)
    same = runs.exported(f"{name}-same")
    assert all(torch.equal(same[key], value) for key, value in there.items())
    order = (list(ENGINES) * 2)[list(ENGINES).index(engine) :]
    for ranks, own in zip((2, 3), order, strict=False):
        kill(runs, f"{name}-others", ranks, {**REFERENCES[kind], **ENGINES[own]})
    runs.run(f"{name}-others", 1, **keys)
    others = runs.metrics(f"{name}-others")
    assert sorted(others) == list(range(STEPS))
    for step, line in others.items():
        assert line["sample_digest"] == expected[step]["sample_digest"], step
        assert line["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), step
        assert line["rewards_margin"] == pytest.approx(expected[step]["rewards_margin"], abs=1e-4)
    gap = compute_gap(runs, f"{name}-others", name)
    print(f"{name}: the update differs by {gap:.1e}")
    assert gap < 1e-3


@pytest.mark.soak
def test_a_copy_is_made_again_from_the_model_that_the_run_started_from(runs: Runs) -> None:
    """And from no other: its weights are changed between a kill and the resume."""
    base = runs.root / "base"

    def save(seed: int) -> None:
        model, processor = load_model(path=None, preset="toy", seed=seed)
        model.save_pretrained(base)
        processor.save_pretrained(base)

    save(3)
    keys = {**REFERENCES["copy"], **ENGINES["fsdp"], "model__path": base, "launch__ranks": 1}
    runs.run("whole", 1, **keys)
    check_run(runs, "whole", "copy")
    kill(runs, "resumed", 1, keys)
    save(4)
    started = get_zygote().start(1, runs.overrides("resumed", **keys), recipe=runs.recipe)
    assert set(started.wait()) == {2}
    assert "was trained over other frozen weights" in started.output()
    save(3)
    runs.run("resumed", 1, **keys)
    found, expected = runs.metrics("resumed"), runs.metrics("whole")
    assert sorted(found) == list(range(STEPS))
    for step, line in found.items():
        for field in ("loss", *REWARDS):
            assert line[field] == expected[step][field], (step, field)
    there = runs.exported("whole")
    assert all(torch.equal(v, there[name]) for name, v in runs.exported("resumed").items())


def test_a_model_that_moves_is_no_reference(runs: Runs, tmp_path: Path) -> None:
    keys = {**REFERENCES["adapter"], "train__stage": "joint", "train__lora": "{rank: 2}"}
    line = runs.overrides("moves", **{"launch__ranks": 1, **keys, **ENGINES["fsdp"]})
    started = get_zygote().start(1, line, recipe=runs.recipe)
    assert set(started.wait()) == {2}
    assert "weights train that are not adapters" in started.output()
