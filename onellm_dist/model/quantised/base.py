"""A frozen linear layer whose weight is held rounded: no parameter, complete on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weight is held rounded.

    Args:
        linear: the layer that it stands for; only its sizes and its bias are used.
        weight: a tensor of torchao, or a `Float8Weight`.
        read_base: reads all of the weight that was rounded.
    """

    def __init__(
        self, linear: nn.Linear, weight: Any, read_base: Callable[[], torch.Tensor]
    ) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.read_base = read_base
        self._held = weight  # a plain attribute: neither parameter nor buffer

    def list_held(self) -> list[torch.Tensor]:
        """The tensors without which there is no weight, where plain tensors hold it."""
        values = [self._held] if type(self._held) is torch.Tensor else vars(self._held).values()
        return [value for value in values if type(value) is torch.Tensor]

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight, [out, in], in the precision of the run; made anew by each access."""
        return expand(self._held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer. `x` is [..., in], the result [..., out]."""
        product: torch.Tensor = _ExpandedProduct.apply(x, self._held)
        return product if self.bias is None else product + self.bias


class _ExpandedProduct(torch.autograd.Function):
    """`x @ weight.T`, which keeps neither `x` nor the expanded weight for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, held: Any) -> torch.Tensor:
        ctx.held = held
        return functional.linear(x, expand(held))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ expand(ctx.held), None


def expand(held: Any) -> torch.Tensor:
    """The values of a rounded weight, in the dtype that it was rounded from.

    A plain tensor, which the planner puts in its place, is returned as it is.
    """
    if type(held) is torch.Tensor:
        return held
    # NF4Tensor has another name for it (torchao 0.18).
    name = "get_original_weight" if hasattr(held, "get_original_weight") else "dequantize"
    values: torch.Tensor = getattr(held, name)()
    return values.to(held.dtype)
