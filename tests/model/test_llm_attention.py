"""Packed attention as transformers' LLMs call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onellm_dist.common.errors import OneLLMError
from onellm_dist.model.llm_attention import compute_llm_attention
from onellm_dist.model.sequence_lengths import SequenceLengths


@pytest.mark.parametrize(
    "option", [{"sliding_window": 4}, {"softcap": 30.0}, {"dropout": 0.1}, {"s_aux": torch.ones(4)}]
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
