"""Attention over packed tokens: one function for the encoder, the UPM and the LLM.

It runs FlashAttention 3 or 2 where installed, else torch's `varlen_attn` (torch >= 2.11); both need
CUDA and bf16 or fp16. Everywhere else it runs scaled-dot-product attention, sequence by sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from onellm_dist.model.kernels.sdpa import compute_sdpa
from onellm_dist.model.kernels.select import select_kernel
from onellm_dist.model.sequence_lengths import SequenceLengths


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lengths: SequenceLengths,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention within each sequence of a pack.

    An empty pack gives an empty output that stays in the autograd graph.

    Args:
        q: [T, H, D/H] queries of all sequences, end to end.
        k: [S, Hkv, D/H] keys; Hkv may divide H (grouped-query attention).
        v: [S, Hkv, D/H] values; narrower heads than those of q are possible.
        seq_lengths: where each sequence begins and ends.
        causal: query i of a sequence sees keys 0 to i; query and key lengths must be equal.
        scale: factor on the scores; default: 1 / sqrt(D/H).
        window: with `causal`, a query sees itself and the `window - 1` keys before it.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [H] scores of a key without value that every query sees.

    Returns:
        [T, H, D/H].

    Raises:
        ValueError: `causal` with query lengths that differ from key lengths.
    """
    # The meta device has no autocast.
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if window is not None and window >= seq_lengths.max_seqlen_k:
        window = None
    kernel = select_kernel(q, softcap=softcap) if sinks is None else None
    if kernel is None or not q.shape[0]:
        return compute_sdpa(
            q,
            k,
            v,
            seq_lengths,
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
    width = v.shape[-1]
    if width < q.shape[-1]:  # kernels want one head width (multi-head latent attention has two)
        v = F.pad(v, (0, q.shape[-1] - width))
    attended = kernel(
        q, k, v, seq_lengths, causal=causal, scale=scale, window=window, softcap=softcap
    )
    return attended[..., :width]
