"""RMSNorm by torch's `F.rms_norm`, which has a kernel for forward and one for backward on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from onellm_dist.model.kernels.pointwise import NAMESPACE, OPERATIONS


def compute_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, fused: bool
) -> torch.Tensor:
    """X / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype.

    The plain twin computes in fp32, casts back and then scales, as LLaMA does. Fused, everything is
    fp32 until the end, so that in 16 bits it rounds once less.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.
        fused: whether torch's kernel runs.
    """
    if not fused or not x.numel() or x.dtype != weight.dtype:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale).to(x.dtype) * weight
    if x.is_meta:  # where torch would take its kernel apart
        out: torch.Tensor = OPERATIONS.counted_rms_norm(x, weight)[0]
        return out
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _make_outputs(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and one factor for each row, which backward needs."""
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _make_gradients(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _run_backward(ctx: Any, gradient: torch.Tensor, _: Any) -> Any:
    return OPERATIONS.counted_rms_norm_backward(gradient, *ctx.saved_tensors)


_NAME = f"{NAMESPACE}::counted_rms_norm"
torch.library.define(_NAME, "(Tensor x, Tensor weight) -> (Tensor, Tensor)")
torch.library.define(
    f"{_NAME}_backward",
    "(Tensor gradient, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
)
torch.library.register_fake(_NAME, _make_outputs)
torch.library.register_fake(f"{_NAME}_backward", _make_gradients)
torch.library.register_autograd(_NAME, _run_backward, setup_context=_keep)
