"""What trains, part by part of a model: how many parameters, at which rate, with which decay."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from onellm_dist.config.schema import OptimSection
from onellm_dist.train.optim.stages import build_parameter_groups, map_parts


class PartSummary(NamedTuple):
    """One part of a model in a stage."""

    part: str
    """A modality (its tokenizer and projector), `upm`, `llm` or `encoder`."""
    parameters: int
    trained: int
    """Parameters that train."""
    decayed: int
    """Trained parameters with weight decay."""
    lr: float
    """Peak learning rate of those that train."""
    weight_decay: float


def summarize_parts(model: nn.Module, optim: OptimSection) -> list[PartSummary]:
    """Summarize the parts of a model that was prepared for its stage.

    Args:
        model: its parameters may be on the meta device; `requires_grad` says which of them train.
        optim: the `optim` section.
    """
    groups = build_parameter_groups(model, optim.weight_decay)
    decayed_ids = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    total, trained, decayed = Counter[str](), Counter[str](), Counter[str]()
    parts = map_parts(model)
    for name, parameter in model.named_parameters():
        part = parts[name]
        total[part] += parameter.numel()
        trained[part] += parameter.numel() * parameter.requires_grad
        decayed[part] += parameter.numel() * (id(parameter) in decayed_ids)
    return [
        PartSummary(part, total[part], trained[part], decayed[part], optim.lr, optim.weight_decay)
        for part in total
    ]
