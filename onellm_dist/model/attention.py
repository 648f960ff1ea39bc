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


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """`packed_attention` for callers that have cumulative lengths only.

    Reading the lengths synchronises with a GPU.

    Args:
        q: [T, H, D/H] queries.
        k: [S, Hkv, D/H] keys.
        v: [S, Hkv, D/H] values.
        cu_seqlens_q: [n + 1] cumulative query lengths.
        cu_seqlens_k: [n + 1] cumulative key lengths.
        max_seqlen_q: query tokens of the longest sequence.
        max_seqlen_k: key tokens of the longest sequence.
        causal: query i of a sequence sees keys 0 to i.
        scale: factor on the scores; default: 1 / sqrt(D/H).

    Returns:
        [T, H, D/H].

    Raises:
        ValueError: a sequence is longer than the maxima, or `causal` with unequal lengths.
    """
    q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    if max(q_lengths, default=0) > max_seqlen_q or max(k_lengths, default=0) > max_seqlen_k:
        raise ValueError(
            f"a sequence is longer than max_seqlen_q={max_seqlen_q} or max_seqlen_k={max_seqlen_k}"
        )
    seq_lengths = SequenceLengths.from_lengths(q_lengths, k_lengths, device=q.device)
    return packed_attention(q, k, v, seq_lengths, causal=causal, scale=scale)
