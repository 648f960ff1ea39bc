"""Real runs of adapters over an LLM in float8 and nf4: what they leave, and what they resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import Runs

from onellm_dist.convert.conversion import convert
from onellm_dist.model.adapters.folder import BASE, read_base
from onellm_dist.model.adapters.lora import BASE as INNER
from onellm_dist.model.presets import load_model
from onellm_dist.train.checkpoint.folder import read_manifest

pytestmark = pytest.mark.slow
NEEDS_TORCHAO = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('torchao')", reason="no torchao"
)
STEPS = 4
KEYS: dict[str, Any] = {
    "train__stage": "tune",
    "train__steps": STEPS,
    "train__lora": "{rank: 4, alpha: 8, targets: [llm.*_proj]}",
}
WORDS = "trained over LLM weights in FORMAT; this model has those from before that rounding"


class RoundedRuns(Runs):
    """Runs over weights in one format."""

    format = ""

    @property
    def own_keys(self) -> dict[str, Any]:
        return {**KEYS, "engine__frozen_weights": self.format}

    @property
    def words(self) -> str:
        return WORDS.replace("FORMAT", self.format)


@pytest.fixture(scope="module", params=["fp8", pytest.param("nf4", marks=NEEDS_TORCHAO)])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RoundedRuns:
    """Two ranks under ZeRO-2, from a model folder."""
    made = RoundedRuns(
        tmp_path_factory.mktemp(request.param),
        ("image", "imu"),
        16,
        data__global_batch=4,
        checkpoint__every=2,
        checkpoint__keep=20,
    )
    model, processor = load_model(path=None, preset="toy", seed=0)
    model.save_pretrained(made.root / "base")
    processor.save_pretrained(made.root / "base")
    made.keys["model__path"] = made.root / "base"
    made.format = request.param
    made.run("first", 2, engine__config="zero2", **made.own_keys)
    return made


def test_checkpoints_hold_adapters_alone_and_say_what_they_stood_beside(runs: RoundedRuns) -> None:
    manifest = read_manifest(runs.step("first", STEPS))
    assert manifest is not None and all(".lora_" in name for name in manifest["parameters"])
    assert not any(INNER in name for name in manifest["parameters"])
    assert manifest["frozen"]["frozen_weights"] == runs.format
    adapter = runs.root / "first" / "adapter"
    assert json.loads((adapter / BASE).read_text())["frozen_weights"] == runs.format
    assert read_base(adapter).frozen_weights == runs.format


def test_it_resumes_at_another_size_and_engine_over_the_same_rounding_alone(
    runs: RoundedRuns,
) -> None:
    resume: dict[str, Any] = {"checkpoint__resume": runs.step("first", 2), "engine__name": "fsdp"}
    runs.run("fewer", 1, **runs.own_keys, **resume)
    there, here = runs.metrics("first"), runs.metrics("fewer")
    assert sorted(here) == [2, 3]
    for step, line in here.items():
        assert line["sample_digest"] == there[step]["sample_digest"]
        assert line["loss"] == pytest.approx(there[step]["loss"], rel=1e-5)
    with pytest.raises(AssertionError):
        runs.run("plain", 1, **{**runs.own_keys, **resume, "engine__frozen_weights": "plain"})
    found = json.loads((runs.root / "plain" / "exit.json").read_text())
    assert f"engine.frozen_weights={runs.format}, now it is plain" in json.dumps(found)


def test_merged_is_the_base_from_before_with_the_adapter(
    runs: RoundedRuns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = runs.root / "first"
    base, merged = (
        load_file(path / "model.safetensors") for path in (runs.root / "base", folder / "model")
    )
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    for name, values in base.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in adapter:
            change = 2 * adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
            assert change.any()
            assert torch.allclose(merged[name], values + change, rtol=0, atol=1e-6), name
        else:
            assert torch.equal(merged[name], values), name
    for kind, source in (("run", folder), ("adapter", folder / "adapter")):
        convert(kind, source, tmp_path / kind, quiet=True)
        found = load_file(tmp_path / kind / "model.safetensors")
        assert all(torch.equal(found[name], merged[name]) for name in merged)
        assert runs.words in (tmp_path / kind / "README.md").read_text()
    assert runs.words in (folder / "model" / "README.md").read_text()
    assert runs.words in (folder / "events.jsonl").read_text()
    load_model(path=folder / "adapter", preset=None, seed=0)
    assert runs.words in caplog.text


def test_a_projector_trains_beside_rounded_weights_that_stay(runs: RoundedRuns) -> None:
    keys: dict[str, Any] = {"train__stage": "align", "train__steps": 1}
    format = keys["engine__frozen_weights"] = "int8" if runs.format == "nf4" else runs.format
    folder = runs.run("projector", 1, engine__name="fsdp", engine__config="", **keys)
    base, model = (
        load_file(path / "model.safetensors") for path in (runs.root / "base", folder / "model")
    )
    changed = {name.split(".")[0] for name in base if not torch.equal(base[name], model[name])}
    assert "projectors" in changed and changed.isdisjoint({"llm", "encoder"})
    assert WORDS.replace("FORMAT", format) in (folder / "model" / "README.md").read_text()
