"""What the host does while the device computes: digest of the step, and plan of the next one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_worlds import open_plan, write

from onellm_dist.common.errors import UsageError
from onellm_dist.data.plan import Plan
from onellm_dist.train import trainer as trainer_module
from onellm_dist.train.step.values import work_ahead
from onellm_dist.train.trainer import Trainer


def ranks(rank: int = 0) -> Any:
    return SimpleNamespace(world_size=2, is_rank_zero=rank == 0)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write(tmp_path, "talk", [], 11)
    return open_plan(tmp_path, {"talk": 1.0}, global_batch=4)


def test_the_next_step_is_planned_and_this_one_is_described(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert work_ahead(plan, 0, 3, ranks(1)) is None
    made: list[int] = []
    assign = plan._assign

    def note(step: int, world_size: int) -> Any:
        made.append(step)
        return assign(step, world_size)

    monkeypatch.setattr(plan, "_assign", note)
    assert work_ahead(plan, 0, 3, ranks()) == plan.digest(0) != plan.digest(1)
    assert made == []  # the plan of step 1 was kept
    assert work_ahead(plan, 1, 3, ranks()) == plan.digest(1)
    assert work_ahead(plan, 2, 3, ranks()) == plan.digest(2)
    assert made == [2]  # there is no step 3


def test_a_step_that_cannot_be_planned_fails_when_it_is_due(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise UsageError("step 1: too large", "it does not fit.", "raise the budget.")

    monkeypatch.setattr(plan, "_assign", fail)
    assert work_ahead(plan, 0, 3, ranks()) == plan.digest(0)
    with pytest.raises(UsageError, match="too large"):
        plan.step(1, 2)


def test_it_is_done_between_the_queued_reduction_and_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    def note(name: str, value: Any = None) -> Any:
        def run(*_: Any, **__: Any) -> Any:
            order.append(name)
            return value

        return run

    monkeypatch.setattr(trainer_module, "work_ahead", note("ahead", "abc"))
    anything: Any = SimpleNamespace
    fake = anything(
        plan=None,
        dist=None,
        config=anything(train=anything(steps=9)),
        heartbeat=anything(enter=note("enter")),
        sample_log=anything(record_step=note("record", 0), new_unreadable={}),
        preemption=anything(is_requested=lambda: False),
        checkpoints=anything(failed=False, is_overdue=False),
        meter=anything(get_reduced=dict),
        callbacks=anything(metrics_to_reduce=lambda _: {}),
        _time=anything(end=lambda _: {}),
    )
    local = anything(
        skipped_samples={},
        data_wait_seconds=0.0,
        count_modalities=lambda _: {},
        totals=anything(reduce=note("reduce"), read=note("read", "values")),
    )
    values: Any = Trainer._reduce(fake, anything(step=3), local)
    assert values == "values"
    assert order == ["enter", "record", "reduce", "ahead", "read"]
    assert local.sample_digest == "abc"
