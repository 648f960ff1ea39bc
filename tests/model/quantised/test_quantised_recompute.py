"""Selective recomputation over rounded linear layers changes no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_packs import make_toy_pack

from onellm_dist.config.train_sections import LoraSection
from onellm_dist.model.adapters.lora import AdapterWeights, add_adapters
from onellm_dist.model.presets import load_model
from onellm_dist.model.quantised.linear import list_quantised, quantise_layers
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.model.weights.lazy import InitialWeights, InMemoryWeights


def make_model(kind: str, mode: str) -> Any:
    model, _ = load_model(path=None, preset="toy", seed=0)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, LoraSection(rank=2))
    drawn = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=drawn)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights = AdapterWeights(InitialWeights(InMemoryWeights(state)), shapes, 0)
    quantise_layers(model, kind, weights, dtype=torch.float32, device=torch.device("cpu"))
    assert list_quantised(model)
    enable_activation_checkpointing(model, mode)
    return model.train()


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
@pytest.mark.seconds
def test_gradients_are_those_without_recomputation(kind: str) -> None:
    if kind != "fp8":
        pytest.importorskip("torchao", reason="torchao is not installed (pip install torchao)")
    batch, found = make_toy_pack(["image", "imu"], 12), {}
    for mode in ("none", "selective"):
        model = make_model(kind, mode)
        out = model(packed=batch)
        out.loss.backward()
        found[mode] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found[mode]["loss"] = out.loss.detach()
    assert any(bool(g.any()) for n, g in found["none"].items() if "lora_A" in n)
    for name, gradient in found["none"].items():
        assert torch.equal(found["selective"][name], gradient), name
