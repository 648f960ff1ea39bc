"""What of `engine.frozen_weights` needs no torchao: refusals, the choice of layers, the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packs import small_model
from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import EngineSection
from onellm_dist.config.train_sections import LoraSection, ParameterRule, TrainSection
from onellm_dist.model.adapters.lora import add_adapters
from onellm_dist.model.quantised.linear import (
    WEIGHT_BYTES,
    add_base,
    find_layers,
    list_quantised,
    plan_layers,
)
from onellm_dist.planner.memory import compute_state, count_parameters
from onellm_dist.train.engine import frozen_weights
from onellm_dist.train.engine.frozen_weights import check_frozen_weights
from onellm_dist.train.engine.select import get_engine

LORA = LoraSection(rank=2, targets=("llm.*q_proj",))


@pytest.mark.parametrize(
    ("installed", "changes", "words"),
    [
        (False, {}, "torchao is not installed"),
        (True, {"lora": LORA.model_copy(update={"dora": True})}, "train.lora.dora=true"),
        (True, {"lora": None}, "stage=tune and without train.lora"),
        (True, {"lora": None, "stage": "joint"}, "stage=joint and without train.lora"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, installed: bool, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(frozen_weights, "has_torchao", lambda: installed)
    train = TrainSection(stage="tune", steps=1, lora=LORA).model_copy(update=changes)
    check_frozen_weights(EngineSection(), train)
    with pytest.raises(UsageError, match=words):
        check_frozen_weights(EngineSection(frozen_weights="nf4"), train)


def test_what_leaves_some_of_the_llm_frozen_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_weights, "has_torchao", lambda: True)
    rules = (ParameterRule(match="llm.model.layers.0.*", freeze=True),)
    for train in (
        TrainSection(stage="tune", steps=1, lora=LORA),
        TrainSection(stage="align", steps=1),
        TrainSection(stage="joint", steps=1, parameters=rules),
    ):
        check_frozen_weights(EngineSection(frozen_weights="int8"), train)


def test_quantised_weights_are_not_sharded() -> None:
    with pytest.raises(ValueError, match="complete on every rank"):
        EngineSection(frozen_weights="int8", frozen="sharded")


def make_adapted() -> Any:
    model: Any = small_model(modalities=["image", "imu"])
    add_adapters(model, LORA)
    return model


def test_frozen_linear_layers_of_the_llm_are_chosen_but_for_its_head() -> None:
    model = make_adapted()
    layers = find_layers(model, "int8")
    assert len(layers) == 2 * 7 and not any("lm_head" in name for name in layers)
    assert "llm.model.layers.0.self_attn.q_proj.base_layer" in layers
    model.llm.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.llm.model.layers[1].mlp.up_proj.weight = model.llm.model.layers[1].mlp.gate_proj.weight
    left_out = layers.keys() - find_layers(model, "int8").keys()
    assert left_out == {
        f"llm.model.layers.{name}_proj" for name in ("0.mlp.up", "1.mlp.up", "1.mlp.gate")
    }
    model.llm.requires_grad_(True)
    with pytest.raises(UsageError, match="no frozen linear layer"):
        plan_layers(model, "nf4")


def test_a_quantised_layer_computes_and_gives_gradients_as_before() -> None:
    linear = nn.Linear(6, 4)
    model = nn.Module()
    x = torch.randn(3, 6, requires_grad=True)
    expected = linear(x)
    expected.square().sum().backward()
    gradient, x.grad = x.grad, None
    model.llm = nn.Sequential(linear.requires_grad_(False))
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    plan_layers(model, "int8")
    assert [n for n, _ in model.named_parameters()] == ["llm.0.bias"]
    found = model.llm(x)
    assert torch.allclose(found, expected, atol=1e-6)
    found.square().sum().backward()
    assert gradient is not None and torch.allclose(x.grad, gradient, atol=1e-6)  # type: ignore[arg-type]


def test_the_planner_counts_their_bytes() -> None:
    plain, rounded = make_adapted(), make_adapted()
    plan_layers(rounded, "nf4")
    before, after = count_parameters(plain), count_parameters(rounded)
    assert after.total == before.total and after.trainable == before.trainable
    assert after.quantised == 2 * (4 * 48 * 48 - 2 * 48 * 24 + 3 * 48 * 96)
    engine = get_engine("fsdp")
    sizes = [
        compute_state(
            engine,
            EngineSection(name="fsdp", frozen_weights=kind),
            counts,
            world_size=1,
            compute_bytes=2,
            state_bytes=12,
        ).frozen_weights
        for kind, counts in (("plain", before), ("nf4", after))
    ]
    assert sizes[0] - sizes[1] == pytest.approx(after.quantised * (2 - WEIGHT_BYTES["nf4"]))


def test_weights_return_to_where_they_stood() -> None:
    model = make_adapted()
    names = [name for name, _ in model.named_parameters()]
    plan_layers(model, "int8")
    items = ((name, name) for name, _ in model.named_parameters())
    found = [name for name, _ in add_base(items, list_quantised(model), str)]
    assert sorted(found) == sorted(names)
    for layer in ("0", "1"):
        first = found.index(f"llm.model.layers.{layer}.self_attn.q_proj.base_layer.weight")
        assert found[first + 1].endswith("q_proj.lora_A.default.weight")
