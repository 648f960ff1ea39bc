"""Lion (arXiv 2302.06675): the sign of a momentum, with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from onellm_dist.config.train_sections import DecayRates
from onellm_dist.train.optim.base import OptimizerComponent

if TYPE_CHECKING:
    import torch


class LionOptions(BaseModel):
    """`optim.options` of `optim.name: lion`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    betas: DecayRates = (0.9, 0.99)
    """Decay rates of the update's momentum and of the one that is kept (the paper's)."""


class Lion(OptimizerComponent):
    """One state tensor per weight; the paper's rates are 3 to 10 times lower than AdamW's."""

    name = "lion"
    options_model = LionOptions
    state_keys = ("exp_avg",)

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        from onellm_dist.train.optim.lion_step import LionOptimizer

        return LionOptimizer(list(groups), betas=self.options.betas)


OPTIMIZER = Lion
