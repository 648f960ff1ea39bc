"""The optimizer's parameter groups: parameters with the same rate, schedule and weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from onellm_dist.config.train_sections import OptimSection
from onellm_dist.model.adapters.lora import MAGNITUDE
from onellm_dist.train.optim.rules import ParameterRate
from onellm_dist.train.optim.schedules import compute_learning_rate


@dataclass(frozen=True)
class ParameterGroup:
    """One group."""

    parameters: tuple[nn.Parameter, ...]
    rate: ParameterRate
    """How the group trains; `weight_decay` is 0 for biases and norm weights."""

    def to_torch(self) -> dict[str, Any]:
        """Build the group as torch's optimizers take it."""
        return {"params": list(self.parameters), "weight_decay": self.rate.weight_decay}


def build_parameter_groups(
    model: nn.Module, rates: Mapping[str, ParameterRate]
) -> list[ParameterGroup]:
    """Group the trainable parameters, those that decay first.

    Biases, RMSNorm weights and the magnitudes of DoRA do not decay. LayerNorm weights, tags,
    queries and learned positions do, as in the reference implementation.

    Args:
        model: the model.
        rates: name of each parameter that trains to how.
    """
    exempt = {id(p) for p in _list_exempt(model)}
    found: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    trained = [(rates[n], p) for n, p in model.named_parameters() if n in rates]
    for rate in dict.fromkeys(rate for rate, _ in trained):  # decayed before exempt, for each rate
        found |= {(rate, False): [], (rate, True): []}
    for rate, parameter in trained:
        found[rate, id(parameter) in exempt].append(parameter)
    return [
        ParameterGroup(tuple(own), rate._replace(weight_decay=0.0) if is_exempt else rate)
        for (rate, is_exempt), own in found.items()
        if own
    ]


def compute_group_rates(
    step: int, optim: OptimSection, total_steps: int, groups: Sequence[ParameterRate]
) -> list[float]:
    """The learning rate of each group in an optimizer step.

    Args:
        step: index of the optimizer step.
        optim: the recipe's `optim` section.
        total_steps: `train.steps`.
        groups: how each group trains.
    """
    by_schedule = {
        name: compute_learning_rate(step, optim, total_steps, name)
        for name in {rate.schedule for rate in groups}
    }
    return [by_schedule[rate.schedule] * rate.scale for rate in groups]


def _list_exempt(model: nn.Module) -> Iterable[nn.Parameter]:
    """Yield the parameters that do not decay."""
    for module in model.modules():
        # Each model family has its own RMSNorm class (LlamaRMSNorm, ..., our UPMNorm). They have no
        # bias, and LayerNorms do.
        own = dict(module.named_parameters(recurse=False))
        is_rms_norm = (
            "norm" in type(module).__name__.lower()
            and list(own) == ["weight"]
            and not isinstance(module, nn.LayerNorm)
        )
        for name, parameter in own.items():
            if name == "bias" or name.endswith("_bias") or is_rms_norm:
                yield parameter
    for name, parameter in model.named_parameters():
        if name.endswith(MAGNITUDE):  # norms of rows
            yield parameter
