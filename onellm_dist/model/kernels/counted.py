"""Attention on the meta device, which has shapes and no values: what a kernel reads, keeps, makes.

A variable-length kernel does not exist there. This operation has its inputs and outputs, and knows
how many pairs of query and key it computes, so that the planner sees the model as it runs on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from onellm_dist.model.sequence_lengths import SequenceLengths

FORWARD = "onellm::counted_attention"
BACKWARD = "onellm::counted_attention_backward"
BACKWARD_PRODUCTS = 2.5
"""Matrix products of the backward kernel over those of forward: five and two."""


def compute_counted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lengths: SequenceLengths,
    *,
    causal: bool,
    scale: float | None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """A `VarlenKernel` for the meta device: the shape of the output, and what backward keeps.

    Args:
        q: [T, H, D/H].
        k: [S, Hkv, D/H].
        v: [S, Hkv, D/H].
        seq_lengths: where each sequence begins and ends.
        causal: query i of a sequence sees keys 0 to i.
        scale: not looked at: it changes no shape.
        window: with `causal`, a query sees itself and the `window - 1` keys before it.
        softcap: not looked at: it changes no shape.

    Returns:
        [T, H, D/H].
    """
    pairs = count_pairs(seq_lengths, causal=causal, window=window)
    out: torch.Tensor = torch.ops.onellm.counted_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), pairs
    )[0]
    return out


def count_pairs(seq_lengths: SequenceLengths, *, causal: bool, window: int | None = None) -> float:
    """How many pairs of query and key are computed in a pack.

    Args:
        seq_lengths: where each sequence begins and ends.
        causal: query i of a sequence sees keys 0 to i: half of all pairs.
        window: as of `compute_counted`.
    """
    total = 0.0
    for q, k in zip(seq_lengths.q_lengths, seq_lengths.k_lengths, strict=True):
        if window is not None and k > window:
            total += window * (k - window / 2)
        else:
            total += q * k * (0.5 if causal else 1.0)
    return total


def count_flops(q: torch.Tensor, v: torch.Tensor, pairs: float, *, backward: bool) -> float:
    """Floating-point operations: two products in forward, five in backward.

    Args:
        q: [T, H, D/H].
        v: [S, Hkv, D/H].
        pairs: pairs of query and key.
        backward: whether it is the backward kernel.
    """
    forward = 2 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])
    return forward * BACKWARD_PRODUCTS if backward else forward


def _make_outputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the log of each query's sum, which backward needs."""
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _make_gradients(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pairs: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.pairs = inputs
    ctx.save_for_backward(q, k, v, *output)


def _run_backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
    found = torch.ops.onellm.counted_attention_backward(gradient, *ctx.saved_tensors, ctx.pairs)
    return (*found, None)


torch.library.define(FORWARD, "(Tensor q, Tensor k, Tensor v, float pairs) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD,
    "(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float pairs)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.register_fake(FORWARD, _make_outputs)
torch.library.register_fake(BACKWARD, _make_gradients)
torch.library.register_autograd(FORWARD, _run_backward, setup_context=_keep)
