"""Attention sequence by sequence in torch's own operations: for CPUs, fp32 and odd head widths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from onellm_dist.model.sequence_lengths import SequenceLengths


@dataclass(frozen=True)
class _Form:
    """What is computed within a sequence; see `compute_sdpa`."""

    causal: bool
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def compute_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lengths: SequenceLengths,
    *,
    causal: bool,
    scale: float | None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a pack with torch's `scaled_dot_product_attention`.

    Neighbouring sequences of equal lengths share one batched call. Causal sequences of different
    lengths are padded into buckets by powers of two. With a soft cap or sinks, the scores are
    computed in full, as transformers' eager attention does.

    Args:
        q: [T, H, D/H].
        k: [S, Hkv, D/H].
        v: [S, Hkv, D/H]; its head width may differ.
        seq_lengths: where each sequence begins and ends.
        causal: query i of a sequence sees keys 0 to i.
        scale: factor on the scores; None: 1 / sqrt(D/H).
        window: with `causal`, a query sees itself and the `window - 1` keys before it.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [H] scores of a key without value that every query sees.

    Returns:
        [T, H, D/H].

    Raises:
        ValueError: `causal` with query lengths that differ from key lengths.
    """
    if causal and seq_lengths.q_lengths != seq_lengths.k_lengths:
        raise ValueError("causal packed attention needs equal query and key lengths")
    form = _Form(causal, scale, window, softcap, sinks)
    if causal and len(seq_lengths.groups) > 1:
        return _compute_buckets(q, k, v, seq_lengths, form)
    groups = seq_lengths.groups or [(0, 1, 1)]
    if len(groups) == 1:
        return _compute_batch(q, k, v, *groups[0], form)
    q_parts, k_parts, v_parts = (
        x.split([n * (q_length if x is q else k_length) for n, q_length, k_length in groups])
        for x in (q, k, v)
    )
    outputs = [
        _compute_batch(a, b, c, *group, form)
        for a, b, c, group in zip(q_parts, k_parts, v_parts, groups, strict=True)
    ]
    return torch.cat(outputs)


def _compute_buckets(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_lengths: SequenceLengths, form: _Form
) -> torch.Tensor:
    """Causal attention over padded buckets: [T, H, D/H] -> [T, H, D/H]."""
    rows, back = seq_lengths.bucket_rows
    buckets = seq_lengths.buckets
    sizes = [n * length for n, length, _ in buckets]
    q_parts, k_parts, v_parts = (x.index_select(0, rows).split(sizes) for x in (q, k, v))
    outputs = [
        _compute_batch(a, b, c, n, length, length, form)
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
    form: _Form,
) -> torch.Tensor:
    """`n` sequences of equal lengths: [n * q_length, H, D/H] -> [n * q_length, H, D/H]."""
    q, k, v = (
        x.reshape(n, length, x.shape[1], x.shape[2]).transpose(1, 2)
        for x, length in ((q, q_length), (k, k_length), (v, k_length))
    )
    windowed = form.window is not None and k_length > form.window
    mask = build_causal_mask(q_length, k_length, form.window, q.device) if windowed else None
    if form.softcap is not None or form.sinks is not None:
        if mask is None and form.causal:
            mask = build_causal_mask(q_length, k_length, None, q.device)
        output = compute_scores(
            q, k, v, mask, scale=form.scale, softcap=form.softcap, sinks=form.sinks
        )
    else:
        output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=form.causal and mask is None,
            scale=form.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return output.transpose(1, 2).reshape(n * q_length, output.shape[1], output.shape[3])


def build_causal_mask(
    q_length: int, k_length: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """[q_length, k_length] bool, True where a query sees a key; the last query sees the last key.

    Args:
        q_length: queries.
        k_length: keys.
        window: how many keys a query sees, itself included; None: all before it.
        device: where the mask is needed.
    """
    query = torch.arange(k_length - q_length, k_length, device=device)[:, None]
    key = torch.arange(k_length, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def compute_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft cap or sinks, which `scaled_dot_product_attention` does not have.

    The softmax is in fp32, as in transformers' eager attention of Gemma 2.

    Args:
        q: [B, H, L, D/H].
        k: [B, Hkv, S, D/H].
        v: [B, Hkv, S, D/H].
        mask: broadcast to [B, H, L, S], True where a query sees a key; or what is added to scores.
        scale: factor on the scores; None: 1 / sqrt(D/H).
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [H] scores of a key without value that every query sees.

    Returns:
        [B, H, L, D/H].
    """
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        # The smallest number, not -inf: a row of padding sees nothing, and must not become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None]
        scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights @ v
