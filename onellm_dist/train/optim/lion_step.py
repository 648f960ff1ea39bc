"""The step of Lion as a torch optimizer; torch 2.15 has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class LionOptimizer(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675, program 1), for whole lists of tensors at a time.

    Args:
        groups: parameter groups (`params`, `weight_decay`).
        betas: decay rates of the update's momentum and of the one that is kept.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Step every parameter that has a gradient.

        Args:
            closure: as of torch's optimizers; it is not called.
        """
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return None

    def _step_group(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        gradients: list[Any] = [p.grad for p in parameters]
        for parameter in parameters:
            if "exp_avg" not in self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
        momenta = [self.state[p]["exp_avg"] for p in parameters]
        (first, second), lr = group["betas"], group["lr"]
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        updates = torch._foreach_mul(momenta, first)
        torch._foreach_add_(updates, gradients, alpha=1 - first)
        torch._foreach_sign_(updates)
        torch._foreach_add_(parameters, updates, alpha=-lr)
        torch._foreach_mul_(momenta, second)
        torch._foreach_add_(momenta, gradients, alpha=1 - second)
