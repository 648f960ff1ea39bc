"""A mixture changed mid-run: datasets continue where they stopped, and only if asked for."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_worlds import open_plan, write
from hypothesis import given, settings
from hypothesis import strategies as st

from onellm_dist.common.errors import UsageError
from onellm_dist.data.mixture import Mixture
from onellm_dist.data.phases import DataPhase
from onellm_dist.data.plan import Plan

FIRST = {"pic": 2.0, "imu": 1.0, "talk": 1.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data_phases")
    write(root, "pic", ["image"], 40)
    write(root, "imu", ["imu"], 25)
    write(root, "talk", [], 11)
    write(root, "other", [], 30)
    return root


def resumed(root: Path, before: Plan, step: int, mixture: dict[str, float], **keys: Any) -> Plan:
    """The plan of a start that resumes the checkpoint of `before` after `step` steps."""
    history = [
        DataPhase.from_json(raw)
        for raw in json.loads(json.dumps([s.to_json() for s in before.data_phases]))
    ]
    plan = open_plan(root, mixture, new_phase=True, **keys)
    plan.follow(history, step)
    return plan


def orders(root: Path, count: int) -> dict[str, list[tuple[int, int, int]]]:
    """The first samples of every dataset's own order."""
    found = {}
    for name in ("pic", "imu", "talk", "other"):
        plan = open_plan(root, {name: 1.0}, global_batch=count)
        found[name] = [(ref.shard, ref.row, ref.epoch) for ref in plan.samples(0)]
    return found


def test_every_dataset_continues_where_it_stopped(root: Path) -> None:
    """Changes of shares and batch size; a dataset joins, another leaves and comes back."""
    pieces = [
        (0, 5, FIRST, 12),
        (5, 9, {"pic": 1.0, "talk": 3.0}, 12),
        (9, 10, {"other": 1.0, "pic": 1.0}, 7),
        (10, 14, FIRST, 16),
    ]
    read: dict[str, list[tuple[int, int, int]]] = {"pic": [], "imu": [], "talk": [], "other": []}
    plan = open_plan(root, FIRST, global_batch=12)
    for start, end, mixture, batch in pieces:
        if start:
            plan = resumed(root, plan, start, mixture, global_batch=batch)
        for step in range(start, end):
            assert len(plan.samples(step)) == batch
            for ref in plan.samples(step):
                read[plan.corpus.datasets[ref.dataset].name].append((ref.shard, ref.row, ref.epoch))
    assert [data_phase.start for data_phase in plan.data_phases] == [0, 5, 9, 10]
    expected = orders(root, 200)
    assert all(len(places) > 3 for places in read.values())
    for name, places in read.items():
        assert places == expected[name][: len(places)], name


@pytest.mark.seconds
def test_kills_around_a_change_leave_one_stream(root: Path) -> None:
    """Random kills, numbers of ranks and older checkpoints; the mixture changes at step 8."""
    second, draw = {"pic": 1.0, "other": 2.0}, random.Random(4)
    first = open_plan(root, FIRST)
    whole = resumed(root, first, 8, second)
    expected = [first.digest(step) for step in range(8)] + [
        whole.digest(step) for step in range(8, 20)
    ]
    saved: dict[int, Plan] = {0: first}
    step, met = 0, Counter[int]()
    while met[19] < 3:
        plan = (
            resumed(root, saved[step], step, FIRST if step < 8 else second)
            if step
            else open_plan(root, FIRST)
        )
        end = min(8 if step < 8 else 20, step + draw.randint(1, 6))
        world_size = draw.choice((1, 2, 3, 5))
        for at in range(step, end):
            names = [
                plan.corpus.sample_id(ref)
                for rank in plan.step(at, world_size).ranks
                for micro in rank
                for ref in micro.samples
            ]
            assert sorted(names) == sorted(plan.corpus.sample_ids(plan.samples(at)))
            assert plan.digest(at) == expected[at]
            met[at] += 1
            saved[at + 1] = plan
        step = draw.choice([at for at in saved if end - 3 <= at <= end])
        if end == 20:
            step = draw.choice([at for at in saved if 4 <= at < 20])
            saved = {at: plan for at, plan in saved.items() if at <= step}
    assert set(met) == set(range(20))


def test_a_change_is_refused_unless_asked_for(root: Path) -> None:
    before = open_plan(root, FIRST)
    with pytest.raises(UsageError) as info:
        open_plan(root, {**FIRST, "pic": 1.0}).follow(before.data_phases, 6)
    assert (
        "data.mixture was 1/2 pic + 1/4 imu + 1/4 talk and is 1/3 pic + 1/3 imu + 1/3 talk"
        in info.value.what
    )
    assert "data.new_phase=true" in info.value.do
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"global_batch": 10}, r"data\.global_batch was 12 and is 10"),
        ({"max_text_tokens": 20}, "max_text_tokens"),
    )
    for keys, words in changes:
        with pytest.raises(UsageError, match=words):
            open_plan(root, FIRST, **keys).follow(before.data_phases, 6)
    same = open_plan(
        root, {"pic": 4.0, "imu": 2.0, "talk": 2.0}, workers=3, pack_llm_tokens=900, new_phase=True
    )
    assert same.follow(before.data_phases, 6) is False
    assert same.data_phases == before.data_phases
    assert [same.digest(step) for step in (6, 7)] == [before.digest(step) for step in (6, 7)]


def test_what_no_data_phase_can_express_is_refused(root: Path, tmp_path: Path) -> None:
    before = open_plan(root, FIRST)
    with pytest.raises(UsageError, match=r"run\.seed is 1, and the checkpoint's is 0"):
        open_plan(root, FIRST, seed=1, new_phase=True).follow(before.data_phases, 6)
    for name, count, kinds in (("pic", 41, ["image"]), ("imu", 25, ["imu"]), ("talk", 11, [])):
        write(tmp_path, name, kinds, count)
    with pytest.raises(UsageError, match="dataset pic: its shards are not those"):
        open_plan(tmp_path, FIRST, new_phase=True).follow(before.data_phases, 6)


def test_a_run_with_rounded_integer_weights_keeps_them(root: Path) -> None:
    """Integers above a sum of 2^20 were rounded once; such a run resumes with the same stream."""
    sizes = {"pic": 2006123.0, "imu": 461233.0}
    began = open_plan(root, sizes)
    began.mixture = Mixture.from_counts([53285, 12251])
    began.data_phases = (began._data_phase(),)
    resumed_plan = open_plan(root, sizes)
    assert resumed_plan.mixture.counts == [2006123, 461233]
    assert resumed_plan.follow(began.data_phases, 6) is False
    assert resumed_plan.mixture.counts == [53285, 12251]
    assert resumed_plan.digest(6) == began.digest(6)


def test_a_step_before_the_data_phase_is_not_in_its_plan(root: Path) -> None:
    plan = resumed(root, open_plan(root, FIRST), 8, {"pic": 1.0})
    with pytest.raises(ValueError, match="step 7 lies before 8"):
        plan.samples(7)
    assert plan.fingerprint() != open_plan(root, {"pic": 1.0}).fingerprint()


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=8), length=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_what_a_prefix_took_is_counted_without_replay(counts: list[int], length: int) -> None:
    mixture = Mixture.from_counts(counts)
    dataset, _ = mixture.locate(np.arange(length))
    assert mixture.count_taken(length) == [int((dataset == j).sum()) for j in range(len(counts))]
