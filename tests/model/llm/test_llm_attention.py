"""Packed attention as transformers' LLMs call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onellm_dist.common.errors import OneLLMError
from onellm_dist.model.llm.attention import build_packed_mask, compute_llm_attention
from onellm_dist.model.sequence_lengths import SequenceLengths


@pytest.mark.parametrize(
    "option", [{"dropout": 0.1}, {"position_bias": torch.ones(1)}, {"is_causal": False}]
)
def test_llms_that_need_more_are_refused_rather_than_wrong(option: dict[str, Any]) -> None:
    q = torch.randn(1, 4, 6, 8)
    seq_lengths = SequenceLengths.from_lengths([6], device=q.device)
    with pytest.raises(OneLLMError, match="packed attention cannot compute"):
        compute_llm_attention(nn.Identity(), q, q, q, None, seq_lengths=seq_lengths, **option)


def test_a_window_longer_than_every_sequence_changes_nothing() -> None:
    q, module = torch.randn(1, 4, 6, 8), nn.Identity()
    seq_lengths = SequenceLengths.from_lengths([6], device=q.device)
    plain, _ = compute_llm_attention(module, q, q, q, None, seq_lengths=seq_lengths)
    windowed, _ = compute_llm_attention(
        module, q, q, q, None, seq_lengths=seq_lengths, sliding_window=6
    )
    assert torch.equal(plain, windowed)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 3},
    "soft cap": {"softcap": 0.5},
    "sinks": {"s_aux": torch.linspace(-1, 2, 4)},
    "all": {"sliding_window": 3, "softcap": 0.5, "s_aux": torch.linspace(-1, 2, 4)},
}


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """One sequence, [L, H, D], written out."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (distance >= 0) & (distance < options.get("sliding_window", len(q)))
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if (sinks := options.get("s_aux")) is not None:
        total = total + sinks.exp()[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total, v)


@pytest.mark.parametrize("lengths", [[9], [7, 7], [5, 1, 9, 2]], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("through", ["argument", "mask"])
def test_windows_soft_caps_and_sinks_within_each_sample(
    options: dict[str, Any], lengths: list[int], through: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths), 4, 8, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(sum(lengths), 2, w, generator=generator, requires_grad=True) for w in (8, 6)
    )
    weight = torch.randn(sum(lengths), 4, 6, generator=generator)
    seq_lengths = SequenceLengths.from_lengths(lengths, device=q.device)
    mask = build_packed_mask(seq_lengths)
    ours, _ = compute_llm_attention(
        nn.Identity(),
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        mask if through == "argument" else mask[:, :, :1].to(torch.bool),
        seq_lengths=seq_lengths if through == "argument" else None,
        **options,
    )
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat([dense(a, b, c, **options) for a, b, c in parts])
    assert torch.allclose(ours[0], expected, atol=1e-6)
    grads, wanted = (
        torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (ours[0], expected)
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("options", [OPTIONS["soft cap"], OPTIONS["sinks"]], ids=["cap", "sinks"])
@pytest.mark.parametrize("keys", [6, 9], ids=["prefill", "static cache"])
def test_padded_batches_know_soft_caps_and_sinks(options: dict[str, Any], keys: int) -> None:
    q = torch.randn(1, 4, 6, 8)
    k = torch.cat([torch.randn(1, 2, 6, 8), torch.zeros(1, 2, keys - 6, 8)], 2)
    ours, _ = compute_llm_attention(nn.Identity(), q, k, k, None, **options)
    expected = dense(*(x[0, :, :6].transpose(0, 1) for x in (q, k, k)), **options)
    assert torch.allclose(ours[0], expected, atol=1e-6)
    last, _ = compute_llm_attention(
        nn.Identity(), q[:, :, 5:], k[:, :, :6], k[:, :, :6], None, **options
    )
    assert torch.allclose(last[0, 0], expected[5], atol=1e-6)
    hidden = torch.tensor([False, True, True, True, True, True]).expand(1, 1, 6, 6).tril()
    masked, _ = compute_llm_attention(nn.Identity(), q, k[:, :, :6], k[:, :, :6], hidden, **options)
    assert masked.isfinite().all()
    shorter = dense(*(x[0, :, 1:6].transpose(0, 1) for x in (q, k, k)), **options)
    assert torch.allclose(masked[0, 1:], shorter, atol=1e-6)


def test_a_mask_that_lost_its_lengths_is_refused() -> None:
    q = torch.randn(1, 4, 6, 8)
    lost = build_packed_mask(SequenceLengths.from_lengths([6], device=q.device))
    del lost.seq_lengths
    with pytest.raises(OneLLMError, match="lengths of the samples do not reach Identity"):
        compute_llm_attention(nn.Identity(), q, q, q, lost)
