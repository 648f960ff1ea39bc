"""Tokens that are drawn row by row, as one operation on the batch."""

from __future__ import annotations

import pytest
import torch

from onellm_dist.model.generation.sampling import NO_TOKEN, RowSampling, choose_tokens

DRAWS = [(i + 0.5) / 4000 for i in range(4000)]
"""Evenly spread, so that each token comes as often as its probability says, up to one time."""


def make_logits(words: int = 9) -> torch.Tensor:
    return torch.randn(words, generator=torch.Generator().manual_seed(0)) * 2


def count_drawn(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    rows = [RowSampling(temperature, top_p, draw) for draw in DRAWS]
    drawn = choose_tokens(logits.expand(len(rows), -1), rows)
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / len(rows)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_they_are_likely(temperature: float) -> None:
    logits = make_logits()
    shares = torch.softmax(logits / temperature, -1)
    assert (count_drawn(logits, temperature, 1.0) - shares).abs().max() < 1.5 / len(DRAWS)


@pytest.mark.parametrize("top_p", [0.0, 0.4, 0.8, 0.999])
def test_the_nucleus_is_the_likeliest_tokens_up_to_their_mass(top_p: float) -> None:
    logits = make_logits()
    shares, order = torch.softmax(logits, -1).sort(descending=True)
    size = sum(1 for i in range(len(shares)) if float(shares[:i].sum()) <= top_p)
    wanted = torch.zeros_like(logits)
    wanted[order[:size]] = shares[:size] / shares[:size].sum()
    assert (count_drawn(logits, 1.0, top_p) - wanted).abs().max() < 1.5 / len(DRAWS)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_no_draw_takes_a_token_without_probability(top_p: float) -> None:
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf])
    drawn = [
        choose_tokens(logits[None], [RowSampling(1.0, top_p, draw)])[0]
        for draw in (0.0, 0.49, 0.51, 1 - 2**-53, 1.0)
    ]
    assert drawn == [1, 1, 3, 3, 3]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 50, generator=generator)
    draws = torch.rand(12, generator=generator).tolist()
    kinds = [(0.0, 1.0), (1.0, 1.0), (2.0, 0.7), (1e-40, 1.0)] * 3
    rows = [
        RowSampling(temperature, top_p, draw)
        for (temperature, top_p), draw in zip(kinds, draws, strict=True)
    ]
    alone = [choose_tokens(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert choose_tokens(logits, rows) == alone
    assert alone[::4] == logits.argmax(-1).tolist()[::4]  # greedy
    assert alone[3::4] == logits.argmax(-1).tolist()[3::4]  # so cold that it is greedy too


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 0.9), (1.0, 1.0)])
def test_logits_that_are_no_numbers_give_their_own_row_no_token(
    temperature: float, top_p: float
) -> None:
    logits = torch.zeros(4, 5)
    logits[1, 2] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    drawn = choose_tokens(logits, [RowSampling(temperature, top_p, 0.5)] * 4)
    assert drawn == [2 if temperature else 0, NO_TOKEN, NO_TOKEN, NO_TOKEN]
