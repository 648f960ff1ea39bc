"""Learning rates of a step."""

from __future__ import annotations

import pytest

from onellm_dist.config.schema import OptimSection
from onellm_dist.train.optim.schedules import compute_learning_rate


def test_warm_up_then_cosine_to_min_lr() -> None:
    optim = OptimSection(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [compute_learning_rate(step, optim, 24) for step in range(30)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55)
    assert rates[24:] == pytest.approx([0.1] * 6)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_constant_schedule_and_decay_steps() -> None:
    assert compute_learning_rate(900, OptimSection(lr=0.5, schedule="constant"), 1000) == 0.5
    assert compute_learning_rate(50, OptimSection(lr=1.0, decay_steps=50), 1000) == 0.0
