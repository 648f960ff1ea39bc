"""Learning rates of a step."""

from __future__ import annotations

import pytest

from onellm_dist.config.train_sections import OptimSection
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


def test_linear_falls_along_a_line() -> None:
    optim = OptimSection(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="linear")
    rates = [compute_learning_rate(step, optim, 10) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.6)
    assert rates[10:] == pytest.approx([0.2, 0.2])


def test_wsd_is_stable_and_then_falls() -> None:
    optim = OptimSection(lr=1.0, warmup_steps=10, schedule="wsd")
    rates = [compute_learning_rate(step, optim, 110) for step in range(110)]
    assert rates[10:101] == [1.0] * 91
    assert rates[100:] == pytest.approx([1.0 - step / 10 for step in range(10)])


@pytest.mark.parametrize("cut", [30, 45])
def test_a_decay_that_starts_at_a_resume_is_that_of_a_run_planned_so(cut: int) -> None:
    """The stable part does not depend on the length of the run."""
    long = OptimSection(lr=1.0, warmup_steps=5, schedule="wsd")
    planned = OptimSection(lr=1.0, warmup_steps=5, schedule="wsd", decay_from=cut)
    first = [compute_learning_rate(step, long, 1000) for step in range(cut)]
    rest = [compute_learning_rate(step, planned, cut + 20) for step in range(cut, cut + 20)]
    whole = [compute_learning_rate(step, planned, cut + 20) for step in range(cut + 20)]
    assert first + rest == whole
    assert rest[0] == 1.0 and rest[-1] == pytest.approx(0.05)
