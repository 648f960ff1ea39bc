"""RMSNorm, fused: one operation for forward and one for backward.

On a GPU it is torch's `F.rms_norm`, which has such kernels. On a CPU torch would take that apart
into ten operations each way; `onellm::rms_norm` is the same as one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from onellm_dist.model.kernels.pointwise import NAMESPACE, Call, give_gradients, refuse_gradients


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
        fused: whether it is one operation each way.
    """
    if not fused or not x.numel() or x.dtype != weight.dtype:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale).to(x.dtype) * weight
    # The planner counts on the meta device, where torch would take its kernel apart, too.
    if x.device.type in ("cpu", "meta") and not torch.compiler.is_compiling():
        out: torch.Tensor = _run_rms_norm(x, weight, eps)[0]
        return out
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and one factor for each row, which backward needs."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


def _backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The gradient of x."""
    wide, normed = gradient.float() * weight, x.float() * scale
    along = (wide * normed).mean(-1, keepdim=True)
    return wide.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)


def _backward_with_weight(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight."""
    wide, normed = gradient.float(), x.float() * scale
    product = wide * normed
    of_weight = product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    along = product.mul_(weight).mean(-1, keepdim=True)
    of_x = (wide * weight).addcmul_(normed, along, value=-1).mul_(scale)
    return of_x.to(x.dtype), of_weight


def _make_outputs(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


def _differentiate(ctx: Any, gradient: torch.Tensor | None, _: Any) -> Any:
    if gradient is None:  # what comes after the norm has none
        return None, None, None
    if ctx.needs_input_grad[1]:
        return (*_call_backward_with_weight(gradient, *ctx.saved_tensors), None)
    return _call_backward(gradient, *ctx.saved_tensors), None, None


def _define(name: str, arguments: str, results: str, body: Any, shapes: Any) -> Call:
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, f"({arguments}) -> {results}")
    torch.library.impl(qualified, "cpu", body)
    torch.library.register_fake(qualified, shapes)
    return Call(name, body)


def _define_backward(name: str, results: str, body: Any, shapes: Any) -> Call:
    kept = "Tensor gradient, Tensor x, Tensor weight, Tensor scale"
    call = _define(name, kept, results, body, shapes)
    refuse_gradients(name)
    return call


_call_backward = _define_backward(
    "rms_norm_backward", "Tensor", _backward, lambda g, x, w, s: torch.empty_like(x)
)
_call_backward_with_weight = _define_backward(
    "rms_norm_backward_with_weight",
    "(Tensor, Tensor)",
    _backward_with_weight,
    lambda g, x, w, s: (torch.empty_like(x), torch.empty_like(w)),
)
_run_rms_norm = give_gradients(
    _define(
        "rms_norm",
        "Tensor x, Tensor weight, float eps",
        "(Tensor, Tensor)",
        _forward,
        _make_outputs,
    ),
    _differentiate,
    _keep,
)
