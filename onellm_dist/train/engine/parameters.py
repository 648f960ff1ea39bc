"""Parameters by name, for engines that replace them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


def name_groups(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups with names as `params`, for parameters that are about to be replaced."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]


def fill_groups(
    groups: Sequence[dict[str, Any]], parameters: dict[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """Return groups of `name_groups` with parameters as `params`; missing names are left out."""
    return [
        {**group, "params": [parameters[n] for n in group["params"] if n in parameters]}
        for group in groups
    ]


def set_learning_rates(groups: Sequence[dict[str, Any]], lr: float | Sequence[float]) -> None:
    """Set the learning rate of an optimizer's groups, or one for each of them.

    Raises:
        ValueError: there are more or fewer rates than groups.
    """
    rates = [lr] * len(groups) if isinstance(lr, float) else lr
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


class ParameterOwners:
    """Which modules register each parameter of a model; tied parameters have several owners.

    Args:
        model: the model; the parameters that it has now are kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), []).append((module, leaf))
        # The parameters are kept alive, so that no id is used twice.
        self._original = dict(model.named_parameters())

    def replace(self, name: str, parameter: nn.Parameter) -> None:
        """Register `parameter` wherever the original parameter `name` was registered."""
        for module, leaf in self._owners[id(self._original[name])]:
            module._parameters[leaf] = parameter


def list_indivisible(model: nn.Module) -> set[str]:
    """Names of the classes that the model and its parts call indivisible: transformer blocks.

    They are transformers' `_no_split_modules`.
    """
    return {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }


def list_persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that belong to the weights, by name."""
    transient = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in transient)
