"""LLMs learn nothing from fresh random tokens, unless a fault lets them see what they predict."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llm_families import tiny_config
from test_llm_check import make_model

from onellm_dist.model.attention import packed_attention
from onellm_dist.model.llm import attention as llm_attention
from onellm_dist.model.llm.call import run_packed
from onellm_dist.model.llm.check import check_llm

WORDS, SAMPLES, LENGTH, STEPS = 97, 8, 12, 500
ENTROPY = math.log(WORDS - 3)


def train(family: str) -> float:
    """Mean loss of the last 50 steps on fresh random tokens."""
    torch.manual_seed(0)
    model = make_model(tiny_config(family))
    llm = model.llm
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05)
    optimizer = torch.optim.AdamW(llm.parameters(), lr=5e-3)
    places = torch.tensor([i for i in range(SAMPLES * LENGTH) if i % LENGTH != LENGTH - 1])
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(3, WORDS, (SAMPLES * LENGTH,))
        logits = run_packed(
            llm,
            model.llm_support,
            llm.get_input_embeddings()(ids),
            token_ids=ids,
            lengths=(LENGTH,) * SAMPLES,
            position_ids=torch.arange(LENGTH).repeat(SAMPLES),
            places=places,
        )
        loss = F.cross_entropy(logits, ids[places + 1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return sum(losses[-50:]) / 50


@pytest.mark.soak
@pytest.mark.parametrize("family", ["stablelm", "mistral", "gemma2", "mamba", "phi3"])
def test_nothing_is_learned_from_fresh_random_tokens(family: str) -> None:
    assert abs(train(family) - ENTROPY) < 0.03


@pytest.mark.soak
def test_an_llm_that_sees_the_future_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def see_all(*arguments: Any, **options: Any) -> torch.Tensor:
        return packed_attention(*arguments, **{**options, "causal": False})

    check_llm(tiny_config("stablelm"))  # before the fault, which it would find
    monkeypatch.setattr(llm_attention, "packed_attention", see_all)
    assert train("stablelm") < 0.5 * ENTROPY
