"""What tuning checks without a run: folders of adapters, rules beside adapters, epochs, merging."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from one_rank import ONE_RANK
from torch import nn

from onellm_dist.common.checksums import write_sums
from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import ModelSection, RunConfig
from onellm_dist.config.train_sections import (
    LoraSection,
    OptimSection,
    ParameterRule,
    TrainSection,
)
from onellm_dist.data import epochs
from onellm_dist.model.adapters.folder import (
    BASE,
    WEIGHTS,
    check_base,
    check_weights,
    load_adapted,
    read_base,
    write_adapter,
)
from onellm_dist.model.adapters.lora import MAGNITUDE, add_adapters, merge_weight
from onellm_dist.model.presets import build_meta_model
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.export import run as run_export
from onellm_dist.train.export.adapter import plan_adapter
from onellm_dist.train.optim.groups import build_parameter_groups
from onellm_dist.train.optim.layers import map_layers
from onellm_dist.train.optim.part_summary import format_parts, summarise_parts
from onellm_dist.train.optim.rules import ParameterPlan, prepare_parameters
from onellm_dist.train.records.config_changes import find_changes
from onellm_dist.train.start.resume_changes import check_epochs_stay


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of an adapter of one layer, whose base has moved from `old` to `base`."""
    found, base = tmp_path / "adapter", tmp_path / "base"
    for path in (found, base):
        path.mkdir()
    (base / "config.json").write_text("{}")
    name = "0.lora_{}.default.weight"
    tensors = {name.format("A"): torch.ones(2, 4), name.format("B"): torch.ones(3, 2)}
    described = {"path": str(tmp_path / "old"), "files": {"config.json": [2, 0, "0" * 64]}}
    write_adapter(found, tensors, LoraSection(rank=2), described)
    write_sums(found)
    return found


def test_a_base_that_has_moved_is_compared_all_the_same(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match=r"which is not here(.|\n)*--base"):
        read_base(folder)
    base = read_base(folder, folder.parent / "base")
    with pytest.raises(UsageError, match="is not the file that the adapter was trained over"):
        check_base(folder, base)
    (folder / BASE).write_text(json.dumps({"path": "old", "files": [1]}))
    with pytest.raises(UsageError, match="files does not give the SHA-256"):
        check_base(folder, read_base(folder, folder.parent / "base"))
    assert not caplog.records
    (folder / BASE).unlink()  # PEFT alone: there is nothing to compare with
    check_base(folder, read_base(folder, folder.parent / "base"))
    (record,) = caplog.records
    assert "does not record the files of its base" in record.getMessage()


def test_damaged_weights_of_an_adapter_are_refused_in_words(folder: Path) -> None:
    check_weights(folder)
    (folder / BASE).write_text(json.dumps({"preset": "toy"}))
    load = partial(load_adapted, folder, lambda _: (nn.Sequential(nn.Linear(4, 3)), None))
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-1] + b"\0")
    with pytest.raises(UsageError, match=rf"{WEIGHTS} is damaged or was changed"):
        load()
    (folder / "SHA256SUMS").unlink()
    (folder / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(UsageError, match=rf"{WEIGHTS} cannot be read"):
        load()
    (folder / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=rf"{WEIGHTS} cannot be read: No such file"):
        load()


def test_an_adapter_of_an_earlier_end_does_not_stay_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was continued with a rule by which more than adapters trained."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / WEIGHTS).write_bytes(b"old")
    monkeypatch.setattr(run_export, "export_model", lambda *_, **__: None)
    trainer: Any = SimpleNamespace(
        config=make_config(tmp_path),
        model=None,
        engine=None,
        processor=None,
        dist=SimpleNamespace(is_rank_zero=True),
        state=SimpleNamespace(steps_done=1),
        events=SimpleNamespace(write=lambda *_, **__: None),
    )
    run_export.export_run(trainer)
    assert not (tmp_path / "adapter").exists()
    assert len(list(tmp_path.glob(f"before-*/adapter/{WEIGHTS}"))) == 1


def make_config(run_dir: Path, batch: int = 10, weight: float = 1.0, **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": str(run_dir)},
            "model": {"preset": "toy"},
            "data": {"mixture": [{"path": "image", "weight": weight}], "global_batch": batch},
            "train": {"stage": "tune", **(train or {"steps": 1})},
            "optim": {"lr": 1.0},
        }
    )


def test_epochs_are_counted_as_written_and_not_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = SimpleNamespace(samples=lambda _: 100)
    monkeypatch.setattr(epochs, "open_dataset", lambda *_, **__: dataset)
    first = epochs.resolve_epochs(make_config(tmp_path, epochs=1.1))
    assert first.train.steps == 11 and first.train.epochs is None
    (tmp_path / "config.yaml").write_text(first.to_yaml())
    target = ResumeTarget(tmp_path / "checkpoints" / "step-00000001")
    check_epochs_stay(epochs.resolve_epochs(first), target)
    changed = epochs.resolve_epochs(make_config(tmp_path, batch=20, epochs=1.1))
    with pytest.raises(UsageError, match=r"changes data.global_batch(.|\n)*set train.steps"):
        check_epochs_stay(changed, target)
    check_epochs_stay(make_config(tmp_path, batch=20, steps=8), target)
    other = epochs.resolve_epochs(make_config(tmp_path, weight=2.0, epochs=1.1))
    assert [change.key for change in find_changes(yaml.safe_load(first.to_yaml()), other)] == [
        "data.mixture"
    ]
    check_epochs_stay(other, target)  # as many steps as before


def test_adapters_alone_are_written_where_span_positions_are_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"span_positions": "learned"}))
    model: Any = SimpleNamespace(named_parameters=lambda: [])
    config = make_config(tmp_path, steps=1, lora={"rank": 2})
    for given, alone in (
        ({"path": tmp_path}, True),
        ({"path": tmp_path, "span_positions": "learned"}, True),
        ({"preset": "toy", "span_positions": "none"}, True),
        ({"preset": "toy", "span_positions": "learned"}, False),
        ({"preset": "toy", "span_positions": "fixed"}, False),
    ):
        own = config.model_copy(update={"model": ModelSection.model_validate(given)})
        target, reason = plan_adapter(own, model, tmp_path / "adapter", dict, ONE_RANK)
        assert (target is not None) == alone, given
        assert bool(reason) != alone, given


@pytest.fixture(scope="module")
def adapted() -> nn.Module:
    model: nn.Module = build_meta_model("toy")
    add_adapters(model, LoraSection(rank=2, dora=True))
    return model


def plan_rules(model: nn.Module, *rules: ParameterRule, stage: Any = "tune") -> ParameterPlan:
    train = TrainSection(stage=stage, steps=1, parameters=rules)
    return prepare_parameters(model, train, OptimSection(lr=1.0), {"image"})


def test_a_rate_does_not_thaw_what_adapters_replace(adapted: nn.Module) -> None:
    rates = plan_rules(adapted, ParameterRule(match="llm.*", lr=0.5, layer_decay=0.9)).rates
    assert rates and all(".lora_" in name for name in rates)
    assert max(rate.scale for rate in rates.values()) < 0.5
    norm = "llm.model.norm.weight"
    thawed = ParameterRule(match=norm)
    assert norm in plan_rules(adapted, thawed).rates
    both = plan_rules(adapted, thawed, ParameterRule(match="llm.*", lr=0.5)).rates
    assert both[norm].scale == 0.5
    assert norm in plan_rules(adapted, ParameterRule(match=norm, lr=0.5, freeze=False)).rates
    with pytest.raises(UsageError, match=r"sets lr of weights that train.lora keeps frozen"):
        plan_rules(adapted, ParameterRule(match=norm, lr=0.5))


def test_magnitudes_do_not_decay_and_the_table_says_why(adapted: nn.Module) -> None:
    plan = plan_rules(adapted)
    decays = {
        id(p): group.rate.weight_decay
        for group in build_parameter_groups(adapted, plan.rates)
        for p in group.parameters
    }
    found = {n: decays[id(p)] for n, p in adapted.named_parameters() if id(p) in decays}
    assert {decay for name, decay in found.items() if name.endswith(MAGNITUDE)} == {0.0}
    assert {decay for name, decay in found.items() if not name.endswith(MAGNITUDE)} == {0.1}

    def tell(plan: ParameterPlan) -> str:
        lines = format_parts(summarise_parts(adapted, OptimSection(lr=1.0), plan))
        return next(line for line in lines if line.startswith("llm"))

    assert "(biases, norms)" in tell(plan)
    without = ParameterRule(match="*.lora_B.*", weight_decay=0.0)
    assert "(biases, norms, by rule)" in tell(plan_rules(adapted, without))


def test_the_last_norm_of_opt_stands_behind_the_blocks() -> None:
    """It is registered ahead of them."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "ffn_dim": 8,
        "word_embed_proj_dim": 4,
        "vocab_size": 8,
    }
    config = OPTConfig(num_hidden_layers=2, num_attention_heads=1, **sizes)
    with torch.device("meta"):
        model = nn.ModuleDict({"llm": OPTForCausalLM(config)})
        model.update({part: nn.Identity() for part in ("encoder", "upm")})
    below = {name: place.below_top for name, place in map_layers(model).items()}
    decoder = "llm.model.decoder"
    assert below[f"{decoder}.final_layer_norm.weight"] == 0
    assert below[f"{decoder}.project_out.weight"] == 0
    for name in ("embed_tokens", "embed_positions", "project_in"):
        assert below[f"{decoder}.{name}.weight"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_merging_an_untrained_magnitude_gives_the_base(
    stored: torch.dtype, dtype: torch.dtype
) -> None:
    """Whatever the run computed in, and the file of the base has."""
    base = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(stored)
    magnitude = torch.linalg.norm(base.float(), dim=1).to(dtype)
    a, b = torch.ones(2, 48, dtype=dtype), torch.zeros(64, 2, dtype=dtype)
    assert torch.equal(merge_weight(base, a, b, magnitude, 2.0), base)


def test_a_magnitude_that_was_trained_in_fp32_is_merged_as_it_is() -> None:
    base = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    magnitude = torch.linalg.norm(base.float(), dim=1) * 1.3
    a, b = torch.ones(2, 1024), torch.zeros(64, 2)
    merged = merge_weight(base, a, b, magnitude, 2.0)
    norms = merged.double().norm(dim=1) / magnitude
    assert float((norms - 1).abs().max()) < 1e-3  # rounded to bf16, some are 4e-3 off
