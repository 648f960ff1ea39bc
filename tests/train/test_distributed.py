"""Joining the other ranks: the GPU of a rank, timeouts longer than the watchdog's, and leaving."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import StabilitySection
from onellm_dist.launch.local import find_free_port
from onellm_dist.launch.ranks import Ranks
from onellm_dist.train.distributed import (
    GROUP_TIMEOUTS,
    collective_timeout,
    join,
    process_group,
    select_gpu,
)


@pytest.mark.parametrize(
    ("local_rank", "local_world_size", "visible", "gpu"),
    [(3, 8, 8, 3), (3, 4, 8, 3), (3, 4, 1, 0), (0, 1, 1, 0), (0, 1, 8, 0)],
    ids=["all", "more_gpus", "one_a_task", "alone", "alone_of_many"],
)
def test_a_rank_takes_its_own_gpu_or_the_only_one_it_sees(
    local_rank: int, local_world_size: int, visible: int, gpu: int
) -> None:
    assert select_gpu(local_rank, local_world_size, visible) == gpu


@pytest.mark.parametrize(
    ("ranks", "visible", "says"), [(8, 4, "8 ranks|4 GPUs"), (1, 0, "1 rank|0 GPUs")]
)
def test_fewer_gpus_than_ranks_are_refused(ranks: int, visible: int, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        select_gpu(0, ranks, visible)
    assert refused.value.what == says.replace("|", " on this node, and this process sees ")


@pytest.mark.parametrize(
    "name", ["hang_minutes", "first_step_minutes", "checkpoint_minutes", "validation_minutes"]
)
def test_a_collective_waits_longer_than_the_watchdog_in_any_phase(name: str) -> None:
    assert collective_timeout(StabilitySection()) > timedelta(minutes=30)
    assert collective_timeout(StabilitySection.model_validate({name: 90.0})) > timedelta(minutes=90)


def test_groups_that_an_engine_makes_wait_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GROUP_TIMEOUTS:
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "environ", {**os.environ, "OMP_NUM_THREADS": "1"})
    wanted = timedelta(minutes=95)
    join(Ranks(0, 1, 0, 1, "127.0.0.1", find_free_port()), StabilitySection(checkpoint_minutes=90))
    try:
        for backend in ("nccl", "gloo"):
            assert distributed_c10d._get_default_timeout(backend) == wanted
        made: Any = dist.new_group([0])
        assert made._get_backend(torch.device("cpu")).options._timeout > wanted - timedelta(
            seconds=1
        )
    finally:
        dist.destroy_process_group()


def test_a_process_is_after_a_run_what_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("LOCAL_SIZE", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    before = dict(os.environ)
    timeouts = [getattr(distributed_c10d, name) for name in GROUP_TIMEOUTS]
    threads = torch.get_num_threads()
    for _ in range(2):
        with process_group(Ranks(0, 1, 0, 1, "127.0.0.1", find_free_port())) as ranks:
            assert ranks.gather("x") == ["x"] and os.environ["RANK"] == "0"
        assert not dist.is_initialized()
        assert dict(os.environ) == before and torch.get_num_threads() == threads
        assert [getattr(distributed_c10d, name) for name in GROUP_TIMEOUTS] == timeouts


def test_a_local_size_that_no_variable_says_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("onellm_dist.train.distributed.count_ranks_here", lambda *_: 3)
    port = find_free_port()
    with process_group(Ranks(0, 1, 0, 1, "127.0.0.1", port, local_size_is_known=False)) as ranks:
        assert ranks.local_world_size == 3 and os.environ["LOCAL_WORLD_SIZE"] == "3"


def test_a_process_group_of_the_caller_is_used_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "environ", {**os.environ, "OMP_NUM_THREADS": "1"})
    dist.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"tcp://127.0.0.1:{find_free_port()}"
    )
    try:
        with process_group(Ranks(0, 1, 0, 1, "127.0.0.1", 1)) as ranks:
            assert ranks.broadcast(3) == 3
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
