"""Frozen linear layers of the LLM in 8 or 4 bits (QLoRA, arXiv 2305.14314), or in float8.

A layer's weight is rounded and held: in int8 and nf4 by torchao 0.18, in float8 by torch. It is
expanded to the precision of the run whenever the layer is used, forward and backward, and never
kept in between; float8 may be multiplied as it is. The weight is not a parameter of the model any
more: engines neither shard nor gather it, and every rank holds all of it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.common.extras import get_install_command
from onellm_dist.model.adapters.lora import LORA_A, BaseWeights
from onellm_dist.model.quantised.base import QuantisedLinear
from onellm_dist.model.quantised.float8 import (
    MULTIPLE,
    Float8Linear,
    make_plan_weight,
    round_weight,
)

NF4_BLOCK, NF4_SCALER_BLOCK = 64, 256
"""Weights with one scale, and scales with one scale of their own, as in the paper (section 3)."""
FLOAT8_FORMAT = "fp8"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names that configurations of LLMs give to the number of experts, to each of which a router has an
output."""
WEIGHT_BYTES = {
    "int8": 1.0,
    FLOAT8_FORMAT: 1.0,
    "nf4": 0.5 + 1 / NF4_BLOCK + 2 / (NF4_BLOCK * NF4_SCALER_BLOCK),
}
"""Format to bytes of a weight, scales included where they count."""

T = TypeVar("T")


def import_torchao() -> Any:
    """Import torchao's module of quantised tensors.

    Raises:
        UsageError: it is not installed, or too old.
    """
    try:
        module = importlib.import_module("torchao.quantization")
        _ = module.to_nf4, module.Int8Tensor, module.PerRow
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"torchao 0.18 or newer cannot be used: {error}",
            "it holds frozen weights in int8 or nf4.",
            f"set engine.frozen_weights=plain, or {get_install_command('quantise')}.",
        ) from None
    return module


def find_layers(model: Any, format: str) -> dict[str, nn.Linear]:
    """Name to layer of what can be quantised: linear layers of the LLM whose weight is frozen.

    The head stays as it is, and so does a layer that shares its weight with another module. In
    float8, so do routers, and layers of sizes that GPUs do not multiply in float8.

    Args:
        model: a OneLLM whose frozen parameters do not require gradients.
        format: a name of `WEIGHT_BYTES`.
    """
    kept = {id(model.get_output_embeddings()), *_list_sharing(model)}
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name.startswith("llm.")
        and not module.weight.requires_grad
        and id(module) not in kept
    }
    if format != FLOAT8_FORMAT:
        return found
    experts = _count_experts(model)
    return {
        name: layer
        for name, layer in found.items()
        if layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
        and not (layer.out_features in experts and _is_in_router(name))
    }


def _is_in_router(name: str) -> bool:
    """Whether a layer is a router or a part of one (transformers 5.23: `gate`, `router.layer`)."""
    return any(part.endswith(("gate", "router")) for part in name.split("."))


def _count_experts(model: Any) -> set[int]:
    config = getattr(getattr(model, "config", None), "text_config", None)
    counts = {getattr(config, name, None) for name in EXPERT_COUNTS}
    return {count for count in counts if isinstance(count, int)}


def _list_sharing(model: nn.Module) -> Iterator[int]:
    """The modules whose weight is also the weight of another."""
    owners: dict[int, list[int]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(id(module))
    for modules in owners.values():
        if len(modules) > 1:
            yield from modules


@torch.no_grad()
def quantise_layers(
    model: Any, format: str, weights: BaseWeights, *, dtype: torch.dtype, device: torch.device
) -> int:
    """Replace the frozen linear layers of the LLM by quantised ones, one after another.

    Args:
        model: a OneLLM, adapters included; its parameters are on the meta device.
        format: a name of `WEIGHT_BYTES`.
        weights: the values of its parameters.
        dtype: the precision of the run; weights are rounded to it first.
        device: where they are held.

    Returns:
        Number of layers.

    Raises:
        UsageError: torchao is not installed, there is nothing to quantise, or a layer has a size
            that the format cannot have.
    """
    torchao = None if format == FLOAT8_FORMAT else import_torchao()

    def hold(name: str, layer: nn.Linear) -> QuantisedLinear:
        read = partial(weights.rows, f"{name}.weight", 0, layer.out_features)
        values = read().to(device=device, dtype=dtype, copy=True).contiguous()
        if torchao is None:
            return Float8Linear(layer, round_weight(values), read)
        return QuantisedLinear(layer, _quantise(torchao, name, format, values), read)

    return _replace_layers(model, format, hold)


def plan_layers(model: Any, format: str, *, in_float8: bool = False) -> None:
    """Replace the layers that `quantise_layers` would, in a model that is planned and never run.

    Args:
        model: as of `quantise_layers`; it computes in the dtype of its weights.
        format: as of `quantise_layers`.
        in_float8: whether the planned device multiplies float8.

    Raises:
        UsageError: there is nothing to quantise.
    """

    def hold(name: str, layer: nn.Linear) -> QuantisedLinear:
        if format != FLOAT8_FORMAT:
            return _hold_plain(name, layer)
        weight = layer.weight.data
        planned = make_plan_weight(weight, weight.dtype)
        return Float8Linear(layer, planned, lambda: weight, in_float8)

    _replace_layers(model, format, hold)


def _hold_plain(_: str, layer: nn.Linear) -> QuantisedLinear:
    values = layer.weight.data
    return QuantisedLinear(layer, values, lambda: values)


def choose_layers(model: Any, format: str) -> dict[str, nn.Linear]:
    """Name to layer of what is quantised.

    Args:
        model: as of `find_layers`.
        format: as of `find_layers`.

    Raises:
        UsageError: there is nothing to quantise.
    """
    layers = find_layers(model, format)
    if not layers:
        sizes = f" with sizes that divide by {MULTIPLE}" if format == FLOAT8_FORMAT else ""
        raise UsageError(
            f"engine.frozen_weights={format}: the LLM has no frozen linear layer{sizes}",
            "there is nothing to quantise.",
            "train adapters (train.lora) or another part, or set engine.frozen_weights=plain.",
        )
    return layers


def _replace_layers(
    model: Any, format: str, hold: Callable[[str, nn.Linear], QuantisedLinear]
) -> int:
    layers = choose_layers(model, format)
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, hold(name, layer))
    return len(layers)


def _quantise(torchao: Any, name: str, format: str, values: torch.Tensor) -> Any:
    if format == "int8":
        return torchao.Int8Tensor.from_hp(values, torchao.PerRow())
    if values.numel() % NF4_BLOCK:
        raise UsageError(
            f"engine.frozen_weights=nf4: {name} has {list(values.shape)} weights",
            f"they do not divide into blocks of {NF4_BLOCK}, which have one scale each.",
            "set engine.frozen_weights=int8.",
        )
    scales = math.gcd(values.numel() // NF4_BLOCK, NF4_SCALER_BLOCK)
    return torchao.to_nf4(values, NF4_BLOCK, scales)


def list_quantised(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Name of the weight of each quantised layer to the layer; {} for a model without."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, QuantisedLinear)
    }


def add_base(
    items: Iterator[tuple[str, T]], layers: dict[str, QuantisedLinear], get: Callable[[str], T]
) -> Iterator[tuple[str, T]]:
    """Put the weights that were rounded where they stood: before the adapter of their layer.

    Args:
        items: name and value of each parameter that the engine has.
        layers: what `list_quantised` says.
        get: gets the value of a weight by its name.

    Yields:
        Those of layers without adapters first, and then `items` with the others among them.
    """
    for name in layers:
        if ".base_layer." not in name:
            yield name, get(name)
    for name, value in items:
        base = f"{name.removesuffix(LORA_A)}.base_layer.weight"
        if name.endswith(LORA_A) and base in layers:
            yield base, get(base)
        yield name, value
