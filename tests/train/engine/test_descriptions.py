"""What engines say about themselves: names, checks before ranks start, bytes per parameter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix_model import tiny_config
from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import EngineSection
from onellm_dist.model.weights.lazy import build_empty_model
from onellm_dist.planner.memory import count_parameters
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.engine.description import BlockSize, StepTraffic, WeightUses
from onellm_dist.train.engine.fsdp.description import FsdpOptions
from onellm_dist.train.engine.fsdp.units import find_units, group_units, set_prefetch
from onellm_dist.train.engine.select import all_engines, get_engine


def test_every_folder_is_an_engine_of_the_schema() -> None:
    assert set(all_engines()) == {"deepspeed", "fsdp"}
    for name, description in all_engines().items():
        assert EngineSection(name=name).name == description.name
        assert description.packages
    with pytest.raises(UsageError, match="use one of: deepspeed, fsdp"):
        get_engine("megatron")


@pytest.mark.parametrize(
    ("keys", "frozen", "trainable", "host"),
    [
        ({"config": "zero1"}, 2, 2 + 4 + 12 / 8, 0),
        ({"config": "zero2"}, 2, 2 + 16 / 8, 0),
        ({"config": "zero3"}, 2 / 8, 18 / 8, 0),
        ({"config": "zero3_offload"}, 2 / 8, 2 / 8, 16 / 8),
        ({"config": "zero2", "frozen": "resident"}, 2, 2 + 16 / 8, 0),
        ({"name": "fsdp", "frozen": "resident"}, 2, 16 / 8, 0),
        ({"name": "fsdp"}, 2 / 8, 16 / 8, 0),
        ({"name": "fsdp", "shard_ranks": 4}, 2 / 4, 16 / 4, 0),
        ({"name": "fsdp", "reduce_every": "step"}, 2 / 8, 12 / 8 + 4, 0),
        ({"name": "fsdp", "frozen": "resident", "reduce_every": "step"}, 2, 2 + 4 + 12 / 8, 0),
    ],
)
def test_bytes_per_parameter_of_adamw_in_bf16_on_8_ranks(
    keys: dict[str, Any], frozen: float, trainable: float, host: float
) -> None:
    section = EngineSection.model_validate(keys)
    found = get_engine(section.name).parameter_bytes(
        section, world_size=8, compute_bytes=2, state_bytes=12
    )
    assert (found.frozen, found.trainable, found.trainable_host) == (frozen, trainable, host)
    stays = keys.get("frozen") == "resident" and keys.get("reduce_every") == "step"
    assert found.gathered == 2 * stays


def test_groups_of_ranks_gather_and_reduce_among_themselves() -> None:
    """Once a step too; the groups meet with their shards alone."""

    def send(**keys: Any) -> StepTraffic:
        section = EngineSection.model_validate({"name": "fsdp", "frozen": "resident", **keys})
        uses = WeightUses(0, 0, 0, 1000, 1000, 0)
        return get_engine("fsdp").traffic(
            section, world_size=8, compute_bytes=2, trainable=1000, uses=uses
        )

    for keys, gathered, reduced in (
        ({}, (4000, 0), (4000, 0)),
        ({"reduce_every": "step"}, (0, 2000), (0, 4000)),
    ):
        alone, groups = send(**keys), send(**keys, shard_ranks=4)
        for found, ranks, between in ((alone, 8, 0), (groups, 4, 1000)):
            assert (found.gather_micro_batch, found.gather_first) == gathered
            assert (found.reduce_micro_batch, found.reduce_last) == reduced
            assert (found.gather_ranks, found.reduce_ranks) == (ranks, ranks)
            assert (found.gather_step, found.reduce_step) == (0, between)
            assert found.step_ranks == 8


def test_keys_of_another_engine_are_refused() -> None:
    section = EngineSection(shard_ranks=2)
    with pytest.raises(UsageError, match=r"need engine.name=fsdp"):
        get_engine("deepspeed").check(section, bf16=True)
    with pytest.raises(UsageError, match="no DeepSpeed configuration zero9"):
        get_engine("deepspeed").check(EngineSection(config=Path("zero9")), bf16=True)


def measure_buffers(stacks: Sequence[Sequence[BlockSize]], **keys: Any) -> float:
    section = EngineSection.model_validate({"name": "fsdp", **keys})
    largest = max(size.trainable + size.frozen for stack in stacks for size in stack)
    return get_engine("fsdp").buffer_bytes(
        section, compute_bytes=2, parameters=1000, largest_unit=largest, stacks=stacks
    )


def test_units_that_are_larger_or_gathered_ahead_cost_memory() -> None:
    stacks = [[BlockSize(10, 0)] * 5, [BlockSize(0, 10)] * 20]
    measure = partial(measure_buffers, stacks)
    assert measure() == measure(prefetch=1) == 10 * (2 * 2 + 4)
    assert measure(prefetch=3) == 10 * (4 * 2 + 4)
    # What stays gathered is counted elsewhere: a buffer holds a unit until it is copied out.
    assert measure(frozen="resident", reduce_every="step", prefetch=3) == 10 * (2 + 4)
    assert measure(unit_parameters=5) == measure()
    assert measure(unit_parameters=30) == 3 * measure()
    assert measure(unit_parameters=31) == 4 * measure(), (
        "a unit ends with the block that reaches it"
    )
    assert measure(unit_parameters=5000) == 20 * measure(), "stacks are not joined"
    assert measure(unit_parameters=5000, frozen="resident") == 5 * measure()
    options = get_engine("fsdp").read_options(
        EngineSection(name="fsdp", prefetch=3, unit_parameters=5), world_size=8
    )
    assert (options.prefetch, options.unit_parameters) == (3, 5)
    for keys in ({"prefetch": 1}, {"unit_parameters": 1}):
        with pytest.raises(UsageError, match=r"engine\.prefetch and .* need engine\.name=fsdp"):
            get_engine("deepspeed").check(EngineSection.model_validate(keys), bf16=True)


@pytest.mark.parametrize("frozen", ["sharded", "resident"])
def test_the_planner_counts_the_units_that_the_engine_makes(frozen: str) -> None:
    """Of blocks of different sizes, of which some train in part, and with any `unit_parameters`."""
    model: Any = build_empty_model(tiny_config(layers=4))
    for parameter in (*model.encoder.parameters(), *model.llm.model.layers[1].parameters()):
        parameter.requires_grad_(False)
    for layer in model.llm.model.layers[2:]:
        layer.self_attn.requires_grad_(False)
    resident = {p for p in model.parameters() if frozen == "resident" and not p.requires_grad}
    stacks = count_parameters(model).stacks
    blocks = [size.trainable + size.frozen for stack in stacks for size in stack]
    assert len(blocks) == 2 + 2 * 2 + 4 and len(set(blocks)) == 3
    seen = set()
    for least in (0, *range(1, 80_000, 1999)):
        _, chains = group_units(model, find_units(model, resident), resident, least)
        made = max(
            sum(p.numel() for m in unit for p in m.parameters() if p not in resident)
            for chain in chains
            for unit in chain
        )
        planned = measure_buffers(stacks, unit_parameters=least, frozen=frozen) / (2 * 2 + 4)
        assert planned == max(made, *blocks), least
        seen.add(planned)
    assert len(seen) > 2


class _Prefetching(nn.Module):
    """It keeps what FSDP2 would be given."""

    def __init__(self, place: int, heard: dict[str, dict[int, list[int]]]) -> None:
        super().__init__()
        self.place, self.heard = place, heard

    def set_modules_to_forward_prefetch(self, modules: list[_Prefetching]) -> None:
        self.heard["forward"][self.place] = [module.place for module in modules]

    def set_modules_to_backward_prefetch(self, modules: list[_Prefetching]) -> None:
        self.heard["backward"][self.place] = [module.place for module in modules]


def test_a_unit_gathers_the_next_ones_of_its_stack_and_in_backward_those_before() -> None:
    heard: dict[str, dict[int, list[int]]] = {"forward": {}, "backward": {}}
    firsts = [_Prefetching(place, heard) for place in range(5)]
    chains: list[list[list[nn.Module]]] = [[[f, nn.Linear(1, 1)] for f in firsts[:4]]]
    chains.append([[firsts[4]]])
    set_prefetch(chains, 0)
    assert heard == {"forward": {}, "backward": {}}, "FSDP2 gathers by itself"
    set_prefetch(chains, 2)
    assert heard["forward"] == {0: [1, 2], 1: [2, 3], 2: [3], 3: [], 4: []}
    assert heard["backward"] == {0: [], 1: [0], 2: [1, 0], 3: [2, 1], 4: []}


def test_blocks_are_joined_within_their_stack_alone() -> None:
    def make_stack(count: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(count))

    model = nn.ModuleDict({"a": make_stack(5), "b": make_stack(2), "end": nn.Linear(10, 10)})
    units = [*model["a"], *model["b"], model["end"]]  # type: ignore[misc]
    sizes = {}
    for least in (0, 100, 101, 250, 10_000):
        groups, chains = group_units(model, units, set(), least)
        assert [unit for group in groups for unit in group] == units
        sizes[least] = [[len(group) for group in chain] for chain in chains]
        assert len(groups) == sum(map(len, chains)) + 1
    each = [[1] * 5, [1] * 2]
    assert sizes == {
        0: each,
        100: each,
        101: [[2, 2, 1], [2]],
        250: [[3, 2], [2]],
        10_000: [[5], [2]],
    }
    resident = set(model["a"].parameters())
    groups, chains = group_units(model, units[5:], resident, 0)
    assert [unit for group in groups for unit in group] == units[5:] and len(chains) == 1


@pytest.mark.parametrize(
    ("config", "frozen", "reason"),
    [
        ("zero2", "sharded", "below stage 3, every rank holds all weights"),
        ("zero3", "resident", "shards all weights alike"),
    ],
)
def test_frozen_weights_that_a_deepspeed_json_places_otherwise_are_refused(
    config: str, frozen: str, reason: str
) -> None:
    engine = get_engine("deepspeed")
    with pytest.raises(UsageError, match=reason):
        engine.check(EngineSection(config=Path(config), frozen=frozen), bf16=True)
    engine.check(EngineSection(config=Path(config)), bf16=True)
    engine.check(EngineSection(config=Path("zero2"), frozen="resident"), bf16=True)
    engine.check(EngineSection(config=Path("zero3"), frozen="sharded"), bf16=True)


def test_resident_weights_are_named_and_searched_for() -> None:
    engine = get_engine("fsdp")
    choices = engine.list_choices(world_size=8, gpus_per_node=8)
    resident = [c for c in choices if c.get("frozen") == "resident"]
    assert resident and len(resident) < len(choices)
    for choice in resident:
        section = EngineSection.model_validate(choice)
        engine.check(section, bf16=True)
        assert "frozen weights resident" in engine.describe(section)


def test_leaf_modules_save_host_time_where_blocks_are_frozen() -> None:
    engine = get_engine("deepspeed")

    def cost(config: str, frozen: float) -> tuple[float, float]:
        found = engine.host_costs(EngineSection(config=Path(config)), frozen_blocks=frozen)
        return found.forward_us, found.backward_us

    assert cost("zero3_leaves", 0) == cost("zero3", 0) == cost("zero3", 1)
    half, whole = cost("zero3_leaves", 0.5), cost("zero3_leaves", 1)
    assert all(w < h < z for w, h, z in zip(whole, half, cost("zero3", 0), strict=True))


def test_resident_blocks_cost_the_host_nothing_under_fsdp() -> None:
    engine = get_engine("fsdp")

    def cost(placement: str, frozen: float) -> tuple[float, float]:
        section = EngineSection.model_validate({"name": "fsdp", "frozen": placement})
        found = engine.host_costs(section, frozen_blocks=frozen)
        return found.forward_us, found.backward_us

    assert cost("sharded", 0.5) == cost("sharded", 0) == cost("resident", 0) > (0, 0)
    assert cost("resident", 0.5) == tuple(us / 2 for us in cost("sharded", 0.5))
    assert cost("resident", 1) == (0, 0)


def test_groups_of_ranks_must_fit_the_world_size() -> None:
    section = EngineSection(name="fsdp", shard_ranks=3)
    assert get_engine("fsdp").read_options(section, world_size=6) == FsdpOptions(3)
    with pytest.raises(UsageError, match="does not divide the 4 ranks"):
        get_engine("fsdp").read_options(section, world_size=4)


def test_a_parameter_counts_as_a_whole_where_a_rank_holds_a_part() -> None:
    part = torch.zeros(3)
    part.ds_numel = 12  # type: ignore[attr-defined]  # what ZeRO-3 leaves on a parameter
    assert get_engine("deepspeed").load().numel(part) == 12
    assert Engine.numel(torch.zeros(3, 4)) == 12
