"""Scaled-dot-product attention, sequence by sequence: for CPUs, fp32 and odd head widths."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from onellm_dist.model.sequence_lengths import SequenceLengths


def compute_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lengths: SequenceLengths,
    *,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attention of a pack with torch's `scaled_dot_product_attention`.

    Neighbouring sequences of equal lengths share one batched call. Causal sequences of different
    lengths are padded into buckets by powers of two.

    Args:
        q: [T, H, D/H].
        k: [S, Hkv, D/H].
        v: [S, Hkv, D/H].
        seq_lengths: where each sequence begins and ends.
        causal: query i of a sequence sees keys 0 to i.
        scale: factor on the scores; None: 1 / sqrt(D/H).

    Returns:
        [T, H, D/H].

    Raises:
        ValueError: `causal` with query lengths that differ from key lengths.
    """
    if causal and seq_lengths.q_lengths != seq_lengths.k_lengths:
        raise ValueError("causal packed attention needs equal query and key lengths")
    if causal and len(seq_lengths.groups) > 1:
        return _compute_buckets(q, k, v, seq_lengths, scale)
    groups = seq_lengths.groups or [(0, 1, 1)]
    q_parts, k_parts, v_parts = (
        x.split([n * (q_length if x is q else k_length) for n, q_length, k_length in groups])
        for x in (q, k, v)
    )
    outputs = [
        _compute_batch(a, b, c, *group, causal=causal, scale=scale)
        for a, b, c, group in zip(q_parts, k_parts, v_parts, groups, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _compute_buckets(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lengths: SequenceLengths,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention over padded buckets: [T, H, D/H] -> [T, H, D/H]."""
    rows, back = seq_lengths.bucket_rows
    buckets = seq_lengths.buckets
    sizes = [n * length for n, length, _ in buckets]
    q_parts, k_parts, v_parts = (x.index_select(0, rows).split(sizes) for x in (q, k, v))
    outputs = [
        _compute_batch(a, b, c, n, length, length, causal=True, scale=scale)
        for a, b, c, (n, length, _) in zip(q_parts, k_parts, v_parts, buckets, strict=True)
    ]
    padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return padded.index_select(0, back)


def _compute_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    n: int,
    q_length: int,
    k_length: int,
    *,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """`n` sequences of equal lengths: [n * q_length, H, D/H] -> [n * q_length, H, D/H]."""
    q, k, v = (
        x.reshape(n, length, x.shape[1], x.shape[2]).transpose(1, 2)
        for x, length in ((q, q_length), (k, k_length), (v, k_length))
    )
    output = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output.transpose(1, 2).reshape(n * q_length, output.shape[1], output.shape[3])
