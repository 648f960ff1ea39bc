"""Parameters by name, for engines that put others in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


def named_groups(model: nn.Module, groups: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """The groups with names as their `params`: parameters are about to be replaced."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]  # type: ignore[attr-defined]


def grouped(
    groups: Sequence[dict[str, Any]], parameters: dict[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """What `named_groups` gave, with these parameters; names that are missing are left out."""
    return [
        {**group, "params": [parameters[n] for n in group["params"] if n in parameters]}
        for group in groups
    ]


class Places:
    """Where each parameter of a model is registered; tied ones have several places under one name."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((module, leaf))
        # The parameters are held, so that no id is given out twice.
        self._held = dict(model.named_parameters())

    def put(self, name: str, parameter: nn.Parameter) -> None:
        """Register `parameter` wherever the one called `name` was when this was made."""
        for module, leaf in self._places[id(self._held[name])]:
            module._parameters[leaf] = parameter


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that belong to the weights."""
    transient = {
        f"{p}.{n}".lstrip(".")
        for p, m in model.named_modules()
        for n in m._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in transient)
