"""What a rank takes when it joins: its GPU, and a patience longer than the watchdog's."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import StabilitySection
from onellm_dist.launch.local import find_free_port
from onellm_dist.launch.ranks import Ranks
from onellm_dist.train.distributed import gpu_of, join, timeout_of


@pytest.mark.parametrize(
    ("local_rank", "local_world_size", "visible", "gpu"),
    [(3, 8, 8, 3), (3, 4, 8, 3), (3, 4, 1, 0), (0, 1, 1, 0), (0, 1, 8, 0)],
    ids=["all", "more_gpus", "one_a_task", "alone", "alone_of_many"],
)
def test_a_rank_takes_its_own_gpu_or_the_only_one_it_sees(
    local_rank: int, local_world_size: int, visible: int, gpu: int
) -> None:
    assert gpu_of(local_rank, local_world_size, visible) == gpu


def test_fewer_gpus_than_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="8 ranks on this node, and this process sees 4 GPUs"):
        gpu_of(0, 8, 4)


@pytest.mark.parametrize(
    "name", ["hang_minutes", "first_step_minutes", "checkpoint_minutes", "validation_minutes"]
)
def test_a_collective_waits_longer_than_the_watchdog_in_any_phase(name: str) -> None:
    assert timeout_of(StabilitySection()) > timedelta(minutes=30)
    assert timeout_of(StabilitySection.model_validate({name: 90.0})) > timedelta(minutes=90)


def test_groups_that_an_engine_makes_wait_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "environ", {**os.environ, "OMP_NUM_THREADS": "1"})
    wanted = timedelta(minutes=95)
    join(Ranks(0, 1, 0, 1, "127.0.0.1", find_free_port()), StabilitySection(checkpoint_minutes=90))
    try:
        for backend in ("nccl", "gloo"):
            assert distributed_c10d._get_default_timeout(backend) == wanted
        made = dist.new_group([0])
        assert made._get_backend(torch.device("cpu")).options._timeout > wanted - timedelta(
            seconds=1
        )
    finally:
        dist.destroy_process_group()
