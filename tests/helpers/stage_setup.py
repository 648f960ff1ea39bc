"""What trains and how, for tests that have a model and no recipe."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from onellm_dist.config.train_sections import OptimSection, TrainSection
from onellm_dist.train.optim.groups import build_parameter_groups
from onellm_dist.train.optim.rules import ParameterPlan, ParameterRate, prepare_parameters


def freeze_for_stage(
    model: nn.Module,
    stage: Any,
    modalities: Collection[str],
    *,
    encoder: bool = False,
    parameters: Collection[Any] = (),
    **optim: Any,
) -> ParameterPlan:
    """Freeze what does not train in a stage, with rules of a recipe."""
    train = TrainSection(
        stage=stage,
        steps=1,
        encoder="trainable" if encoder else "frozen",
        parameters=tuple(parameters),
    )
    return prepare_parameters(model, train, OptimSection(lr=1.0, **optim), modalities)


def make_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups of what trains, all at the same rate."""
    rate = ParameterRate(1.0, "constant", weight_decay)
    rates = {name: rate for name, p in model.named_parameters() if p.requires_grad}
    return [group.to_torch() for group in build_parameter_groups(model, rates)]
