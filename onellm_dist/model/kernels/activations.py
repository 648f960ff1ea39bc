"""SwiGLU's product and CLIP's quick GELU, fused; each beside its plain twin."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from onellm_dist.model.kernels.pointwise import CompiledBody, define_operation

QUICK = 1.702
"""Slope of CLIP's approximation of GELU."""


def compute_silu_product(gate: torch.Tensor, up: torch.Tensor, *, fused: bool) -> torch.Tensor:
    """silu(gate) * up, elementwise; two tensors of one shape and dtype.

    Fused, it keeps its inputs alone for backward.
    """
    if not fused or gate.dtype != up.dtype or gate.shape != up.shape:
        return F.silu(gate) * up
    out: torch.Tensor = _run_silu_product(gate, up)
    return out


def compute_quick_gelu(x: torch.Tensor, *, fused: bool) -> torch.Tensor:
    """X * sigmoid(1.702 x), elementwise. Fused, it keeps its input alone for backward."""
    if not fused:
        return x * torch.sigmoid(QUICK * x)
    out: torch.Tensor = _run_quick_gelu(x)
    return out


def _silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _silu_product_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward.default(gradient * up, gate), gradient * F.silu(gate)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(QUICK * x)


def _quick_gelu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(QUICK * x)
    inner: torch.Tensor = torch.ops.aten.sigmoid_backward.default(gradient * x, sigmoid)
    return gradient * sigmoid + inner * QUICK


def _keep_inputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


_run_silu_product = define_operation(
    "silu_product",
    "(Tensor gate, Tensor up) -> Tensor",
    forward=CompiledBody(_silu_product),
    forward_shapes=lambda gate, up: torch.empty_like(gate),
    backward=CompiledBody(_silu_product_backward),
    backward_shapes=lambda gradient, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
    backward_schema="(Tensor gradient, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    keep=_keep_inputs,
)
_run_quick_gelu = define_operation(
    "quick_gelu",
    "(Tensor x) -> Tensor",
    forward=CompiledBody(_quick_gelu),
    forward_shapes=torch.empty_like,
    backward=CompiledBody(_quick_gelu_backward),
    backward_shapes=lambda gradient, x: torch.empty_like(x),
    backward_schema="(Tensor gradient, Tensor x) -> Tensor",
    keep=_keep_inputs,
)
