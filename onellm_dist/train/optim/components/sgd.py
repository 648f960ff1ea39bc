"""Stochastic gradient descent with momentum; weight decay is added to the gradient (L2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from onellm_dist.config.train_sections import OptimSection
from onellm_dist.train.optim.base import OptimizerComponent

if TYPE_CHECKING:
    import torch


class SgdOptions(BaseModel):
    """`optim.options` of `optim.name: sgd`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the update that is carried over to the next step; 0 keeps no state."""
    nesterov: bool = False
    """Whether the gradient is taken after the momentum step."""


class Sgd(OptimizerComponent):
    """torch's fused SGD."""

    name = "sgd"
    options_model = SgdOptions

    def __init__(self, optim: OptimSection) -> None:
        super().__init__(optim)
        self.state_keys = ("momentum_buffer",) if self.options.momentum else ()

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(
            list(groups),
            lr=0.0,
            momentum=self.options.momentum,
            nesterov=self.options.nesterov,
            fused=True,
        )


OPTIMIZER = Sgd
