"""AdamW with decoupled weight decay (arXiv 1711.05101), the paper's optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onellm_dist.train.optim.base import OptimizerComponent

if TYPE_CHECKING:
    import torch


class AdamW(OptimizerComponent):
    """torch's fused AdamW; it reads `optim.betas` and `optim.eps`."""

    name = "adamw"
    reads = ("betas", "eps")
    state_keys = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            list(groups), lr=0.0, betas=self.optim.betas, eps=self.optim.eps, fused=True
        )


OPTIMIZER = AdamW
