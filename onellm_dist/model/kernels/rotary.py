"""Rotary position embedding of queries and keys, fused, beside its plain twin."""

from __future__ import annotations

from typing import Any

import torch

from onellm_dist.model.kernels.pointwise import CompiledBody, define_operation


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys as transformers' LLaMA does (the two halves of a head are a pair).

    No gradient flows to `cos` and `sin`.

    Args:
        q: [B, H, S, D/H].
        k: [B, Hkv, S, D/H].
        cos: [B, S, R]; the first R channels of each head are rotated.
        sin: [B, S, R].
        unsqueeze_dim: where `cos` and `sin` get the dimension of the heads.

    Returns:
        (q, k), rotated.
    """
    width = cos.shape[-1]
    if width < q.shape[-1]:
        turned = rotate(q[..., :width], k[..., :width], cos, sin, unsqueeze_dim)
        parts = ((x, y[..., width:]) for x, y in zip(turned, (q, k), strict=True))
        return torch.cat(next(parts), -1), torch.cat(next(parts), -1)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if not q.dtype == k.dtype == cos.dtype == sin.dtype:
        return _turn(q, cos, sin), _turn(k, cos, sin)
    found: tuple[torch.Tensor, torch.Tensor] = _run_rotary(q, k, cos, sin)
    return found


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _turn_back(g: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = g.shape[-1] // 2
    crossed = g * sin
    return g * cos + torch.cat((crossed[..., half:], -crossed[..., :half]), dim=-1)


def _rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _rotary_backward(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _turn_back(q, cos, sin), _turn_back(k, cos, sin)


def _keep_angles(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[2:])


def _shapes(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


_run_rotary = define_operation(
    "rotary",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    forward=CompiledBody(_rotary),
    forward_shapes=_shapes,
    backward=CompiledBody(_rotary_backward),
    backward_shapes=_shapes,
    backward_schema="(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    keep=_keep_angles,
)
