"""`engine.frozen: auto`: what a start decides on devices that the planner knows, and on others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from plain_counts import write_recipe

from onellm_dist.config.load import load_config
from onellm_dist.config.schema import RunConfig
from onellm_dist.planner.hardware import get_gpu_kind
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.start import frozen_placement
from onellm_dist.train.start.frozen_placement import FrozenDecision, resolve_frozen

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
NUMA = "AMD EPYC 9999"


@dataclass
class SomeRanks:
    """Ranks of two nodes, as far as a start asks them; all of them are this process."""

    names: list[str]
    world_size: int = 16
    local_world_size: int = 8
    is_rank_zero: bool = True
    device: Any = None

    def gather(self, _: str) -> list[str]:
        return self.names

    def broadcast(self, value: Any) -> Any:
        return value

    ask_rank_zero = Distributed.ask_rank_zero


class SomePlan:
    data_phases = (type("Phase", (), {"start": 0})(),)

    def count_mean_text(self, _: int) -> int:
        return 17


@pytest.fixture(autouse=True)
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_placement, "name_device", lambda _: "asked of all ranks")


def decide(
    recipe: Path, keys: list[str], *names: str, **ranks: Any
) -> tuple[RunConfig, FrozenDecision | None]:
    config = load_config(recipe, keys)
    dist: Any = SomeRanks([*names], **ranks)
    plan: Any = SomePlan()
    found, decision = resolve_frozen(config, plan, dist)
    assert found.model_copy(update={"engine": config.engine}) == config
    return found, decision


def resolve(recipe: Path, keys: list[str], *names: str, **ranks: Any) -> RunConfig:
    return decide(recipe, keys, *names, **ranks)[0]


@pytest.mark.slow
def test_a_start_decides_by_the_devices_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    # A network so slow that the traffic of a toy model counts.
    slow = get_gpu_kind("h100").model_copy(update={"node_network_gb_s": 0.1})
    monkeypatch.setattr("onellm_dist.planner.command.get_gpu_kind", lambda _: slow)
    fsdp = ["engine.name=fsdp"]
    config, decision = decide(recipe, fsdp, H100)
    assert config.engine.frozen == "resident" and decision is not None
    assert decision.frozen == "resident" and "a step takes" in decision.reason
    assert resolve(recipe, fsdp, H100, H200).engine.frozen == "resident"
    # One rank gathers nothing, but its host is slower for the hooks of what is sharded.
    assert resolve(recipe, fsdp, H100, world_size=1, local_world_size=1).engine.frozen == "resident"
    # The planner knows no such devices, or only those of some ranks.
    config, decision = decide(recipe, fsdp, NUMA)
    assert config.engine.frozen == "auto" and decision is not None
    assert decision.frozen == "sharded" and decision.reason.endswith(f"no constants for {NUMA}")
    assert resolve(recipe, fsdp, H100, NUMA).engine.frozen == "auto"
    # The recipe says it, or the engine leaves no choice.
    config, decision = decide(recipe, [*fsdp, "engine.frozen=sharded"], H100)
    assert config.engine.frozen == "sharded" and decision is None
    for name in ("zero2", "zero3"):
        config, decision = decide(recipe, [f"engine.config={name}"], H100)
        assert config.engine.frozen == "auto" and decision is None


def test_what_cannot_be_planned_is_sharded_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(tmp_path)
    keys = ["engine.name=fsdp", "data.mixture=[{path: mine}]"]  # nobody says what is in it
    with caplog.at_level("WARNING"):
        assert resolve(recipe, keys, H100).engine.frozen == "auto"
    assert "the planner cannot say" in caplog.text


@pytest.mark.parametrize("where", ["planner", "plan"])
def test_a_planner_that_fails_keeps_no_rank_waiting(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 answers the others whatever happens, and the run trains without a plan."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("no\nnumber")

    if where == "planner":
        monkeypatch.setattr("onellm_dist.planner.budgets.find_placement", fail)
    else:
        monkeypatch.setattr(SomePlan, "count_mean_text", fail)
    sent: list[Any] = []

    def broadcast(_: SomeRanks, value: Any) -> Any:
        sent.append(value)
        return value

    monkeypatch.setattr(SomeRanks, "broadcast", broadcast)
    with caplog.at_level("WARNING"):
        config, decision = decide(write_recipe(tmp_path), ["engine.name=fsdp"], H100)
    assert config.engine.frozen == "auto" and sent == [(None, decision)]
    assert decision is not None and decision.frozen == "sharded"
    assert decision.reason == "the planner cannot say: ZeroDivisionError: no number"
    assert decision.reason in caplog.text
