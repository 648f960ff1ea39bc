"""Frozen linear layers of the LLM in 8 or 4 bits (QLoRA, arXiv 2305.14314), by torchao 0.18.

torchao rounds a layer's weight and holds it; it is expanded to the precision of the run whenever
the layer is used, forward and backward, and never kept in between. The weight is no parameter of
the model any more: engines neither shard nor gather it, and every rank holds all of it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from onellm_dist.common.errors import UsageError
from onellm_dist.model.lora import LORA_A, BaseWeights

NF4_BLOCK, NF4_SCALER_BLOCK = 64, 256
"""Weights with one scale, and scales with one scale of their own, as in the paper (section 3)."""
WEIGHT_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / NF4_BLOCK + 2 / (NF4_BLOCK * NF4_SCALER_BLOCK)}
"""Format to bytes of a weight, scales included where they count."""

T = TypeVar("T")


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weight torchao holds.

    Args:
        linear: the layer that it stands for; only its sizes and its bias are used.
        weight: torchao's tensor.
        read_base: reads the weight that was rounded, whole.
    """

    def __init__(
        self, linear: nn.Linear, weight: Any, read_base: Callable[[], torch.Tensor]
    ) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.read_base = read_base
        self._held = weight  # a plain attribute: neither parameter nor buffer

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight, [out, in], in the precision of the run; made anew by each access."""
        return expand(self._held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer. `x` is [..., in], the result [..., out]."""
        product: torch.Tensor = _ExpandedProduct.apply(x, self._held)
        return product if self.bias is None else product + self.bias


class _ExpandedProduct(torch.autograd.Function):
    """`x @ weight.T`, which keeps neither `x` nor the expanded weight for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, held: Any) -> torch.Tensor:
        ctx.held = held
        return functional.linear(x, expand(held))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ expand(ctx.held), None


def expand(held: Any) -> torch.Tensor:
    """The values of a tensor of torchao, in the dtype that it was rounded from.

    A plain tensor, which the planner puts in its place, is returned as it is.
    """
    if type(held) is torch.Tensor:
        return held
    # NF4Tensor has another name for it (torchao 0.18).
    name = "get_original_weight" if hasattr(held, "get_original_weight") else "dequantize"
    values: torch.Tensor = getattr(held, name)()
    return values.to(held.dtype)


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
            "pip install 'onellm-dist[quantise]', or set engine.frozen_weights=plain.",
        ) from None
    return module


def find_layers(model: Any) -> dict[str, nn.Linear]:
    """Name to layer of what can be quantised: linear layers of the LLM whose weight is frozen.

    The head stays as it is, and so does a layer that shares its weight with another module.

    Args:
        model: a OneLLM whose frozen parameters do not require gradients.
    """
    kept = {id(model.get_output_embeddings()), *_list_sharing(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name.startswith("llm.")
        and not module.weight.requires_grad
        and id(module) not in kept
    }


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
    torchao = import_torchao()

    def hold(name: str, layer: nn.Linear) -> QuantisedLinear:
        read = partial(weights.rows, f"{name}.weight", 0, layer.out_features)
        values = read().to(device=device, dtype=dtype, copy=True).contiguous()
        return QuantisedLinear(layer, _quantise(torchao, name, format, values), read)

    return _replace_layers(model, format, hold)


def plan_layers(model: Any, format: str) -> None:
    """Replace the layers that `quantise_layers` would, in a model that is planned and never run.

    Raises:
        UsageError: there is nothing to quantise.
    """
    _replace_layers(model, format, _stand_in)


def _stand_in(_: str, layer: nn.Linear) -> QuantisedLinear:
    values = layer.weight.data
    return QuantisedLinear(layer, values, lambda: values)


def _replace_layers(
    model: Any, format: str, hold: Callable[[str, nn.Linear], QuantisedLinear]
) -> int:
    layers = find_layers(model)
    if not layers:
        raise UsageError(
            f"engine.frozen_weights={format}: the LLM has no frozen linear layer",
            "there is nothing to quantise.",
            "train adapters (train.lora) or another part, or set engine.frozen_weights=plain.",
        )
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
