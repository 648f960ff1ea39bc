"""Packed attention against dense softmax, sequence by sequence."""

from __future__ import annotations

import math

import pytest
import torch
from packs import relative

from onellm_dist.model.attention import packed_attention
from onellm_dist.model.sequence_lengths import SequenceLengths


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lengths: list[int],
    k_lengths: list[int],
    causal: bool,
) -> torch.Tensor:
    """[T, H, D] by one softmax per sequence and head."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = []
    for a, b, c in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", a, b) / math.sqrt(q.shape[2])
        if causal:
            scores = scores.masked_fill(
                torch.ones(len(a), len(b), dtype=torch.bool).triu(1), -math.inf
            )
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
    return torch.cat(out)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths", "causal"),
    [
        ([7], [7], False),
        ([7], [7], True),
        ([5, 5, 5], [5, 5, 5], False),
        ([5, 5, 5], [5, 5, 5], True),
        ([3, 9, 1, 9, 40], [3, 9, 1, 9, 40], False),
        ([3, 9, 1, 9, 40, 2, 17], [3, 9, 1, 9, 40, 2, 17], True),
        ([4, 4, 4], [11, 11, 6], False),
    ],
)
def test_equals_dense_attention(
    kv_heads: int, q_lengths: list[int], k_lengths: list[int], causal: bool
) -> None:
    torch.manual_seed(0)
    q = torch.randn(sum(q_lengths), 4, 8, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths), kv_heads, 8, requires_grad=True) for _ in range(2))
    weight = torch.randn(sum(q_lengths), 4, 8)
    ours = packed_attention(
        q, k, v, SequenceLengths.from_lengths(q_lengths, k_lengths, device=q.device), causal=causal
    )
    ours_grad = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    reference = dense(q, k, v, q_lengths, k_lengths, causal)
    reference_grad = torch.autograd.grad((reference * weight).sum(), (q, k, v))
    assert relative(ours, reference) < 1e-6
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours_grad, reference_grad, strict=True))


def test_an_empty_pack_stays_in_the_graph() -> None:
    q, k, v = (torch.empty(0, 4, 8, requires_grad=True) for _ in range(3))
    for causal in (False, True):
        out = packed_attention(
            q, k, v, SequenceLengths.from_lengths([], device=q.device), causal=causal
        )
        assert out.shape == (0, 4, 8)
        assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [(0, 4, 8)] * 3


def test_causal_attention_needs_equal_lengths() -> None:
    q, k = torch.randn(2, 1, 8), torch.randn(3, 1, 8)
    with pytest.raises(ValueError, match="equal query and key lengths"):
        packed_attention(
            q, k, k, SequenceLengths.from_lengths([2], [3], device=q.device), causal=True
        )
