"""Real runs of what tuning asks for: adapters, rules, a decay that starts at a resume, an end by
validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_onellm import get_small_keys
from toy_packs import make_toy_pack
from toy_runs import Runs

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.conversion import convert
from onellm_dist.evaluation.kept_checkpoints import append_entry, build_entry
from onellm_dist.model.adapters.folder import BASE, CONFIG, WEIGHTS
from onellm_dist.model.presets import load_model
from onellm_dist.model.weights.lazy import open_model
from onellm_dist.train.checkpoint.folder import read_manifest
from onellm_dist.train.records.json_lines import read_lines

pytestmark = pytest.mark.slow
STEPS = 4
ADAPTERS = "{rank: 4, alpha: 8, targets: [llm.*, encoder.*, upm.*]}"
DORA = "{rank: 2, alpha: 4, dora: true, rslora: true, targets: [llm.*self_attn*]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The base that the runs with adapters start from is the end of a run with a WSD schedule."""
    made = Runs(
        tmp_path_factory.mktemp("tuning"),
        ("image", "imu"),
        16,
        data__global_batch=4,
        checkpoint__every=1,
        checkpoint__keep=20,
        optim__schedule="wsd",
        optim__min_lr=0,
        **get_small_keys(),
    )
    made.run("planned", 1, train__steps=6, optim__decay_from=STEPS, engine__name="fsdp")
    return made


def train_adapters(runs: Runs, name: str, ranks: int, **keys: Any) -> Path:
    fixed: dict[str, Any] = {"train__stage": "tune", "train__steps": STEPS, "train__lora": ADAPTERS}
    base = runs.root / "planned" / "model"
    return runs.run(name, ranks, model__path=base, **{"engine__config": "cpu", **fixed, **keys})


@pytest.fixture(scope="module")
def adapted(runs: Runs) -> Path:
    """A run of two ranks that trained adapters alone."""
    return train_adapters(runs, "lora", 2)


def open_trained(path: Path) -> Any:
    model, _ = load_model(path=path, preset=None, seed=0)
    return model


def read_events(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def test_a_decay_that_starts_at_a_resume_is_that_of_a_run_planned_so(runs: Runs) -> None:
    runs.run("stable", 1, train__steps=STEPS, optim__decay_steps=1000, engine__name="fsdp")
    resume: dict[str, Any] = {
        "checkpoint__resume": runs.step("stable", STEPS),
        "engine__name": "fsdp",
    }
    runs.run("decayed", 1, train__steps=6, optim__decay_from=STEPS, **resume)
    stable, decayed, planned = map(runs.metrics, ("stable", "decayed", "planned"))
    rates = [{**stable, **decayed}[step]["lr"] for step in range(6)]
    assert rates == [planned[step]["lr"] for step in range(6)] == [1e-3] * 5 + [5e-4]
    for name, values in runs.exported("planned").items():
        assert torch.equal(values, runs.exported("decayed")[name]), name


EARLY: dict[str, Any] = {
    "train__epochs": 3,
    "train__early_stopping": "{patience: 2, min_delta: 100}",
    "data__validation": "{split: test_seen, samples: 4, every: 1}",
    "train__parameters": "[{match: llm.model.norm.*, lr: 1e-4, schedule: linear}]",
    "optim__name": "lion",
    "engine__config": "zero2",
}
"""Of three epochs in 24 steps three are done: no loss is 100 below the first one."""


def test_a_run_that_was_stopped_ends_by_validation_where_it_would_have(runs: Runs) -> None:
    """The validation that was due at the stop is made up for; none is twice."""
    runs.run("undisturbed", 1, **EARLY)
    folder = runs.run("stopped", 1, stop=1, **EARLY)
    assert [line["steps_done"] for line in read_lines(folder / "validation.jsonl")] == [1]
    # The scores of the kept checkpoint on benchmarks are not validation.
    kept = max(path.name for path in (folder / "checkpoints").glob("step-*"))
    append_entry(folder, build_entry(f"{kept}-1a2b3c4d", int(kept[5:]), [], 1.0), alone=True)
    assert read_lines(folder / "validation.jsonl")[-1]["steps_done"] == 2
    runs.run("stopped", 1, **EARLY)
    losses = {
        name: [
            (line["steps_done"], line["loss"])
            for line in read_lines(runs.root / name / "validation.jsonl")
            if "loss" in line
        ]
        for name in ("undisturbed", "stopped")
    }
    assert losses["stopped"] == losses["undisturbed"] and len(losses["stopped"]) == 3
    assert sorted(runs.metrics("stopped")) == [0, 1, 2]


def test_a_run_ends_by_validation_and_does_not_continue(runs: Runs) -> None:
    for _ in range(2):
        folder = runs.run("early", 1, **EARLY)
        assert sorted(runs.metrics("early")) == [0, 1, 2]
    end = read_events(folder, "end")
    assert [e["status"] for e in end] == ["done", "done"]
    assert "early stopping: 2 validations in a row" in end[1]["reason"]
    start = read_events(folder, "start")[0]
    assert "24 steps, 3 epochs of 32 samples" in start["length"]
    llm = next(part for part in start["parameters"] if part["part"] == "llm")
    assert llm["learning_rates"] == [1e-4, 1e-4] and llm["schedules"] == ["linear"]


def test_a_resume_at_the_same_size_is_bit_identical(runs: Runs, adapted: Path) -> None:
    train_adapters(runs, "again", 2, checkpoint__resume=runs.step("lora", 2))
    for name in ("model/model.safetensors", f"adapter/{WEIGHTS}"):
        there, here = (load_file(folder / name) for folder in (adapted, runs.root / "again"))
        assert there.keys() == here.keys()
        assert all(torch.equal(there[key], here[key]) for key in there)


def test_adapters_resume_at_another_size_and_engine(runs: Runs, adapted: Path) -> None:
    fsdp = {"engine__name": "fsdp", "engine__config": ""}
    train_adapters(runs, "fewer", 1, checkpoint__resume=runs.step("lora", 2), **fsdp)
    there, here = runs.metrics("lora"), runs.metrics("fewer")
    assert sorted(here) == [2, 3]
    for step, line in here.items():
        assert line["sample_digest"] == there[step]["sample_digest"]
        assert line["loss"] == pytest.approx(there[step]["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(there[step]["grad_norm"], rel=1e-3)


def test_checkpoints_hold_adapters_alone(runs: Runs, adapted: Path) -> None:
    manifest = read_manifest(runs.step("lora", STEPS))
    assert manifest is not None and all(".lora_" in name for name in manifest["parameters"])
    whole = sum(t.numel() for t in runs.exported("lora").values())
    start = read_events(adapted, "start")[0]
    assert start["trainable"] < 0.2 * whole
    parts = {part["part"]: part["trained"] > 0 for part in start["parameters"]}
    assert parts == {name: name in ("llm", "encoder", "upm") for name in parts}, (
        "stage tune, and adapters in all three"
    )


def test_an_adapter_over_its_base_is_the_merged_model(adapted: Path) -> None:
    """By our loader, by PEFT itself, and by both conversions."""
    from peft import PeftModel

    batch = make_toy_pack(["image", "imu"], 20)
    merged, ours, base = (
        open_trained(path)
        for path in (adapted / "model", adapted / "adapter", adapted.parent / "planned" / "model")
    )
    untrained = base.eval().compute_packed_logits(batch)[0]
    wrapped: Any = PeftModel.from_pretrained(base, adapted / "adapter")
    peft = wrapped.base_model.model
    expected = merged.eval().compute_packed_logits(batch)[0]
    for model in (ours, peft):
        found = model.eval().compute_packed_logits(batch)[0]
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert (untrained - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "source"), [("run", ""), ("adapter", "adapter")])
def test_conversions_merge(adapted: Path, tmp_path: Path, kind: str, source: str) -> None:
    convert(kind, adapted / source, tmp_path / "out", quiet=True)
    exported, found = (
        load_file(folder / "model.safetensors") for folder in (adapted / "model", tmp_path / "out")
    )
    assert exported.keys() == found.keys()
    assert all(torch.equal(exported[name], found[name]) for name in exported)
    load_model(path=tmp_path / "out", preset=None, seed=0)


def test_a_magnitude_is_merged_too(runs: Runs) -> None:
    """DoRA over a preset, whose weights are drawn again."""
    preset: dict[str, Any] = {"model__path": "", "model__preset": "toy"}
    folder = runs.run("dora", 1, train__stage="tune", train__steps=2, train__lora=DORA, **preset)
    merged = load_file(folder / "model" / "model.safetensors")
    loaded, _ = load_model(path=folder / "adapter", preset=None, seed=0)
    own = dict(loaded.named_parameters())
    for name, values in merged.items():
        assert torch.allclose(own[name].detach(), values, atol=1e-6), name


def test_a_projector_that_trains_too_is_in_the_merged_model_alone(runs: Runs) -> None:
    folder = train_adapters(runs, "joint", 1, train__stage="joint", train__steps=1)
    assert (folder / "model").is_dir() and not (folder / "adapter").exists()
    assert read_events(folder, "export")[0]["alone"].startswith("32 parameters beside the adapters")


def test_an_adapter_is_refused_over_other_weights(adapted: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "adapter"
    shutil.copytree(adapted / "adapter", copy)
    with pytest.raises(UsageError, match=r"holds an adapter(.|\n)*onellm convert adapter"):
        open_model(path=copy, preset=None, seed=0)
    base = json.loads((copy / BASE).read_text())
    (copy / "SHA256SUMS").unlink(missing_ok=True)
    (copy / BASE).write_text(json.dumps({**base, "path": str(adapted / "model")}))
    with pytest.raises(UsageError, match="is not the file that the adapter was trained over"):
        load_model(path=copy, preset=None, seed=0)
    (copy / BASE).write_text(json.dumps({**base, "path": "/nowhere"}))
    with pytest.raises(UsageError, match=r"/nowhere, which is not here"):
        load_model(path=copy, preset=None, seed=0)
    kept = json.loads((copy / CONFIG).read_text())
    (copy / BASE).write_text(json.dumps(base))
    (copy / CONFIG).write_text(json.dumps({**kept, "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(UsageError, match="rank_pattern is not merged here"):
        convert("adapter", copy, tmp_path / "out", quiet=True)


def test_other_adapters_than_the_checkpoint_s_are_refused(runs: Runs, adapted: Path) -> None:
    with pytest.raises(AssertionError):
        train_adapters(
            runs,
            "other",
            1,
            train__lora=ADAPTERS.replace("alpha: 8", "alpha: 4"),
            checkpoint__resume=runs.step("lora", 2),
        )
    found = json.loads((runs.root / "other" / "exit.json").read_text())
    assert "has other adapters than train.lora says: alpha was 8.0" in json.dumps(found)
