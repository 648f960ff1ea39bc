"""Packing: every sample once, within the budgets, balanced, deterministic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onellm_dist.data.costs import CostModel, count_llm_tokens
from onellm_dist.data.packing import ItemSizes, TokenBudget, find_too_large, pack
from onellm_dist.modalities import all_modalities

SAMPLE = st.tuples(st.integers(1, 50), st.integers(0, 90), st.integers(1, 10_000))


def loads_of(samples: list[tuple[int, int, int]]) -> ItemSizes:
    return ItemSizes(*(np.asarray(column, dtype=np.int64) for column in zip(*samples, strict=True)))


@given(
    samples=st.lists(SAMPLE, min_size=1, max_size=120),
    world_size=st.integers(1, 9),
    llm=st.integers(50, 200),
    encoder=st.integers(90, 400),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.seconds
def test_every_sample_once_within_the_budgets_and_as_many_micro_batches_a_rank(
    samples: list[tuple[int, int, int]], world_size: int, llm: int, encoder: int
) -> None:
    loads, budget = loads_of(samples), TokenBudget(llm, encoder)
    assigned = pack(loads, budget, world_size)
    assert len(assigned) == world_size
    assert len({len(packs) for packs in assigned}) == 1
    assert sorted(i for packs in assigned for members in packs for i in members.tolist()) == list(
        range(len(samples))
    )
    for members in (members for packs in assigned for members in packs):
        assert loads.llm[members].sum() <= llm
        assert loads.encoder[members].sum() <= encoder
        assert (np.diff(members) > 0).all()
    again = pack(loads, budget, world_size)
    assert [[m.tolist() for m in packs] for packs in again] == [
        [m.tolist() for m in packs] for packs in assigned
    ]


def test_fewer_samples_than_ranks_leave_ranks_empty() -> None:
    assigned = pack(loads_of([(5, 5, 5), (5, 5, 5)]), TokenBudget(10, 10), 5)
    assert sorted(len(packs[0]) for packs in assigned) == [0, 0, 0, 1, 1]


def test_a_sample_larger_than_a_budget_is_found() -> None:
    loads = loads_of([(5, 5, 1), (5, 50, 1), (50, 5, 1)])
    assert find_too_large(loads, TokenBudget(60, 60)) is None
    assert find_too_large(loads, TokenBudget(60, 20)) == 1
    assert find_too_large(loads, TokenBudget(20, 60)) == 2


def eight_modalities(
    rng: np.random.Generator, n: int, cap_encoder: int
) -> tuple[ItemSizes, TokenBudget]:
    kinds, model = list(all_modalities().values()), CostModel()
    which = np.arange(n) % len(kinds)
    text = np.clip(rng.lognormal(2.8, 0.6, n).astype(np.int64) + 2, 3, 96)
    llm = count_llm_tokens(text, np.ones(n, dtype=np.int64))
    media = np.asarray([model.media([kind]) for kind in kinds])[which]
    encoder = np.asarray([kind.encoder_tokens for kind in kinds])[which]
    return ItemSizes(llm, encoder, model.samples(media, llm)), TokenBudget(4096, cap_encoder)


@pytest.mark.parametrize("world_size", [16, 8])
@pytest.mark.parametrize("encoder", [16_384, 65_536])
def test_stage_one_is_balanced(world_size: int, encoder: int) -> None:
    """Batch 5120 of eight modalities: the fullest micro-batch costs at most 1.10 x the mean."""
    for seed in range(3):
        loads, budget = eight_modalities(np.random.default_rng(seed), 5120, encoder)
        assigned = pack(loads, budget, world_size)
        costs = [loads.cost[members].sum() for packs in assigned for members in packs]
        assert max(costs) / np.mean(costs) <= 1.10
        fewest = (
            max(loads.llm.sum() / budget.llm, loads.encoder.sum() / budget.encoder) / world_size
        )
        assert len(assigned[0]) <= 1.12 * fewest + 1


def test_ranks_of_a_micro_batch_and_totals_of_ranks_are_similar() -> None:
    loads, budget = eight_modalities(np.random.default_rng(5), 2048, 16_384)
    assigned = pack(loads, budget, 8)
    costs = np.asarray([[loads.cost[members].sum() for members in packs] for packs in assigned])
    assert (costs.max(axis=0) / costs.mean(axis=0)).max() <= 1.05
    assert costs.sum(axis=1).max() / costs.sum(axis=1).mean() <= 1.02
