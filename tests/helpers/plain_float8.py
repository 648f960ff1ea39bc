"""A frozen linear layer in float8 as it is defined: written apart from the package's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def round_plainly(x: torch.Tensor) -> torch.Tensor:
    """Each row rounded to e4m3 times the least power of two that holds it, in x's dtype."""
    peak = x.double().abs().amax(-1, keepdim=True).clamp_min(2.0**-60) / 448
    scale = torch.exp2(torch.ceil(torch.log2(peak)))
    return ((x.double() / scale).to(torch.float8_e4m3fn).double() * scale).to(x.dtype)


class PlainFloat8(nn.Module):
    """Inputs and weight are rounded; gradients pass as if inputs were not."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.rounded = round_plainly(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = round_plainly(x.detach()) + (x - x.detach())  # of the last term: the gradient
        return functional.linear(rounded, self.rounded, self.bias)


def use_plain_float8(llm: Any) -> None:
    """Replace the frozen linear layers of an LLM but its head, where 16 divides their sizes."""
    for name, module in list(llm.named_modules()):
        if (
            type(module) is nn.Linear
            and not module.weight.requires_grad
            and not name.endswith("lm_head")
            and module.in_features % 16 == module.out_features % 16 == 0
        ):
            parent, _, own = name.rpartition(".")
            setattr(llm.get_submodule(parent), own, PlainFloat8(module))
