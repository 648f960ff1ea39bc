"""Router load: how much of each modality goes to which expert, and a warning about idle experts.

Router weights are constants of the model (position-wise routers on learned queries), so one forward
of a step gives all of them, on every rank. They stay on the device until they are read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from onellm_dist.config.schema import TrackSection
from onellm_dist.packed import PackedOutput
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.records.events import Events


class RouterWatch:
    """Keeps the router weights of the model's latest forward.

    Args:
        model: returns PackedOutput; before the engine shards it.
        modalities: the modalities whose load is read (those of the mixture).
    """

    def __init__(self, model: nn.Module, modalities: Collection[str]) -> None:
        self._modalities = set(modalities)
        self._weights: dict[str, torch.Tensor] = {}
        model.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, PackedOutput):
            self._weights = output.router_weights

    def read(self) -> dict[str, list[float]]:
        """Modality -> mean weight of each expert over the queries. Waits for the device once."""
        weights = {name: w for name, w in self._weights.items() if name in self._modalities}
        if not weights:
            return {}
        means = torch.stack([w.mean(0) for w in weights.values()]).tolist()
        return dict(zip(weights, means, strict=True))


class UnderuseDetector:
    """Finds experts to which no modality has given a share of its weight for long.

    Args:
        share: an expert is underused where every modality gives it less than this.
        steps: for this many steps.
    """

    def __init__(self, share: float, steps: int) -> None:
        self._share = share
        self._steps = steps
        self._since: dict[int, int] = {}
        self._reported: set[int] = set()

    def update(self, step: int, load: Mapping[str, list[float]]) -> list[int]:
        """Add the load after a step.

        Returns:
            Experts that are found to be underused now; each is returned once until it recovers.
        """
        found = []
        for expert, largest in enumerate(map(max, zip(*load.values(), strict=True))):
            if largest >= self._share:
                self._since.pop(expert, None)
                self._reported.discard(expert)
                continue
            since = self._since.setdefault(expert, step)
            if step - since >= self._steps and expert not in self._reported:
                self._reported.add(expert)
                found.append(expert)
        return found


class Experts(Callback):
    """Records `router_load` at the log interval, and warns about underused experts.

    Args:
        watch: gives the router load.
        track: the `track` section.
        log_every: steps between two readings.
        steps: optimizer steps of the whole run; the last one is read too.
        events: where warnings go.
    """

    def __init__(
        self,
        watch: RouterWatch,
        *,
        track: TrackSection,
        log_every: int,
        steps: int,
        events: Events,
    ) -> None:
        self._watch = watch
        self._track = track
        self._log_every = log_every
        self._steps = steps
        self._events = events
        self._detector = UnderuseDetector(
            track.underused_expert_share, track.underused_expert_steps
        )

    def metrics_to_record(self, step: int) -> Mapping[str, Any]:
        if (step + 1) % self._log_every and step + 1 != self._steps:
            return {}
        load = self._watch.read()
        for expert in self._detector.update(step, load) if load else ():
            self._warn(step, expert, load)
        return {"router_load": load or None}

    def _warn(self, step: int, expert: int, load: Mapping[str, list[float]]) -> None:
        shares = {name: round(weights[expert], 4) for name, weights in load.items()}
        listed = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
        self._events.write(
            "expert_underused",
            step=step,
            expert=expert,
            load=shares,
            message=f"expert {expert} is underused: for {self._track.underused_expert_steps} steps "
            f"no modality gave it {self._track.underused_expert_share:g} of its weight ({listed})",
            warning=True,
        )
