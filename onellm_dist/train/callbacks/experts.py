"""Router load: how much of each modality goes to which expert, and a warning when an expert starves.

The gates are constants of the weights (position-wise routers on learned queries), so one forward of a step tells all of them, on
every rank. They stay on the device until somebody asks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from onellm_dist.packed import PackedOutput


class RouterWatch:
    """Keeps the gates of the model's last forward.

    Args:
        model: returns PackedOutput; before the engine shards it.
        modalities: those whose load is told (the mixture's).
    """

    def __init__(self, model: nn.Module, modalities: Collection[str]) -> None:
        self._modalities = set(modalities)
        self._gates: dict[str, torch.Tensor] = {}
        model.register_forward_hook(self._note)

    def _note(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, PackedOutput):
            self._gates = output.router_weights

    def read(self) -> dict[str, list[float]]:
        """Modality -> mean gate of each expert, over the queries. Waits for the device once."""
        gates = {name: gate for name, gate in self._gates.items() if name in self._modalities}
        if not gates:
            return {}
        means = torch.stack([gate.mean(0) for gate in gates.values()]).tolist()
        return dict(zip(gates, means, strict=True))


class Starvation:
    """Tells when an expert gets less than a share of every modality, for long.

    Args:
        share: an expert starves where no modality gives it so much.
        steps: for so many steps.
    """

    def __init__(self, share: float, steps: int) -> None:
        self._share, self._steps = share, steps
        self._since: dict[int, int] = {}
        self._told: set[int] = set()

    def update(self, step: int, load: Mapping[str, list[float]]) -> list[int]:
        """Take the load after a step; returns the experts that are found to starve now (each is told once, until it recovers)."""
        found = []
        for expert, largest in enumerate(map(max, zip(*load.values(), strict=True))):
            if largest >= self._share:
                self._since.pop(expert, None)
                self._told.discard(expert)
                continue
            since = self._since.setdefault(expert, step)
            if step - since >= self._steps and expert not in self._told:
                self._told.add(expert)
                found.append(expert)
        return found
