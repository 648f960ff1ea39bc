"""`onellm plan --search`: the combination that a look at every one finds, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from plain_counts import write_recipe

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.config.load import load_config
from onellm_dist.config.schema import EngineSection, RunConfig
from onellm_dist.data.packing import TokenBudget
from onellm_dist.data.token_budget import read_budget
from onellm_dist.model.recompute import MODES
from onellm_dist.planner import search as search_module
from onellm_dist.planner.command import PlanOptions, make_planner, run_plan
from onellm_dist.planner.frozen import suits_start
from onellm_dist.planner.memory import MemoryPlan
from onellm_dist.planner.run_plan import Planner, vary
from onellm_dist.planner.search import (
    SearchSpace,
    compute_least,
    count_longest,
    make_space,
    search,
    search_budget,
)
from onellm_dist.train.engine import frozen_weights

H100 = PlanOptions(gpu="h100", gpus_per_node=2)
BUDGETS = ((512, 8192), (1024, 16384), (2048, 16384), (2048, 40000))
ENGINES = (
    EngineSection(config=Path("zero2")),
    EngineSection(config=Path("cpu")),
    EngineSection(name="fsdp", reduce_every="step"),
)
SPACE = SearchSpace(tuple(TokenBudget(*budget) for budget in BUDGETS), MODES, ENGINES)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def give_memory(planner: Planner, size: float) -> Planner:
    """The same planner, with its counts, for GPUs of this many bytes."""
    gpu = planner.cluster.gpu.model_copy(update={"memory_gb": size / 1e9})
    planner.cluster = replace(planner.cluster, gpu=gpu)
    return planner


@pytest.mark.slow
def test_search_finds_what_a_look_at_every_combination_finds(recipe: Path) -> None:
    everything = make_planner(recipe, [], H100)
    tried = []
    for engine, mode, (llm, encoder) in product(ENGINES, MODES, BUDGETS):
        changes = {
            "engine": engine.model_dump(),
            "train.activation_checkpointing": mode,
            "data.pack_llm_tokens": llm,
            "data.pack_encoder_tokens": encoder,
        }
        config = vary(everything.config, changes)
        plan = everything.plan(config)
        tried.append((plan.time.total, plan.memory.total, config))
        # What is left out without counting could not have fitted.
        assert compute_least(everything, config) <= plan.memory.total * (1 + 1e-9)
    sizes = sorted(size for _, size, _ in tried)
    searching = everything  # with its counts
    best = set()
    for size in (sizes[0], *sizes[2::5], sizes[-1]):
        fitting = [(time, config) for time, need, config in tried if need <= size + 1]
        fastest = min(time for time, _ in fitting)
        found = search(give_memory(searching, size + 1), SPACE)
        assert searching.compute_time(found.config).total == pytest.approx(fastest, rel=1e-12)
        assert searching.compute_memory(found.config).total <= size + 1
        assert found.combinations == len(tried)
        best.add(found.overrides)
    assert len(best) > 2
    with pytest.raises(UsageError, match=r"none of 36 combinations fits: (.|\n)*--nodes"):
        search(give_memory(searching, sizes[0] - 1e6), SPACE)


def test_the_space_has_the_recipe_s_own_values(recipe: Path) -> None:
    planner = make_planner(recipe, ["engine.config=zero2"], H100)
    space = make_space(planner)
    assert space.budgets[0] == TokenBudget(1024, 16384) and space.engines[0].config is not None
    assert set(space.modes) == set(MODES)
    assert {e.name for e in space.engines} == {"deepspeed", "fsdp"}
    counts = {
        planner.get_step(
            vary(
                planner.config,
                {"data.pack_llm_tokens": b.llm, "data.pack_encoder_tokens": b.encoder},
            )
        ).micro_batches
        for b in space.budgets
    }
    assert {1, 2, 3, 4} <= counts
    longest = count_longest(planner)
    assert all(budget.llm >= longest for budget in space.budgets[1:])
    pairs = ["data.text_format=conversation", "train.loss=dpo", "data.preference_pairs=true"]
    pairs += ["train.stage=tune", "train.lora={rank: 2}"]
    assert count_longest(make_planner(recipe, pairs, H100)) == 2 * longest


def test_what_cannot_be_compiled_is_no_answer(recipe: Path) -> None:
    planner = make_planner(recipe, ["engine.config=zero2", "train.compile=blocks"], H100)
    space = make_space(planner)
    assert set(space.modes) == {"none", "full"}
    names = {(e.name, e.config and e.config.stem) for e in space.engines}
    assert names == {("deepspeed", "zero1"), ("deepspeed", "zero2"), ("fsdp", None)}
    for mode, engine in product(space.modes, space.engines):
        changes = {"engine": engine.model_dump(), "train.activation_checkpointing": mode}
        vary(planner.config, changes)


@pytest.mark.seconds
def test_quantised_weights_stay_so_and_need_less(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_weights, "has_torchao", lambda: True)
    keys = ["train.stage=align", "engine.config=zero2"]
    sizes = []
    for kind in ("plain", "int8"):
        planner = make_planner(recipe, [*keys, f"engine.frozen_weights={kind}"], H100)
        assert {e.frozen_weights for e in make_space(planner).engines} == {kind}
        sizes.append(planner.plan().memory.state.frozen_weights)
    assert sizes[0] - sizes[1] == pytest.approx(planner.parameters.quantised) and sizes[1]


@pytest.mark.parametrize(
    "keys",
    [
        ["engine.config=zero3_offload"],
        ["engine.config=zero3_hpz"],
        ["engine.name=fsdp", "engine.shard_ranks=1"],
    ],
    ids=["offload", "hpz", "hybrid"],
)
@pytest.mark.seconds
def test_engines_that_cannot_be_timed_are_no_answer_of_a_search(
    recipe: Path, keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    planner = make_planner(recipe, keys, H100)
    assert planner.config.engine not in make_space(planner).engines
    run_plan(recipe, keys, H100)
    assert "--search leaves such engines out" in capsys.readouterr().out


@pytest.mark.slow
def test_the_found_recipe_is_written_on_the_one_it_began_with(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    space = replace(SPACE, modes=("none",), engines=ENGINES[::2])
    monkeypatch.setattr(search_module, "make_space", lambda _: space)
    out = tmp_path / "found" / "fast.yaml"
    out.parent.mkdir()
    options = replace(H100, search=True, write=out)
    assert run_plan(recipe, ["train.steps=7"], options) == EXIT_DONE
    shown = capsys.readouterr().out.splitlines()
    written = load_config(out)
    assert written.train.steps == 7 and "base: ../recipe.yaml" in out.read_text()
    assert shown[0] == "the fastest of 8 combinations that fits:"
    overrides = shown[1].split()
    assert overrides and load_config(recipe, ["train.steps=7", *overrides]) == written
    with pytest.raises(UsageError, match="the file exists"):
        run_plan(recipe, [], options)
    with pytest.raises(UsageError, match="--write needs --search"):
        run_plan(recipe, [], replace(H100, write=tmp_path / "new.yaml"))


@pytest.mark.slow
def test_what_each_start_decides_is_not_written(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan, and the time before, are those of what a start would decide on this machine."""
    engines = EngineSection(name="fsdp"), EngineSection(name="fsdp", frozen="resident")
    space = SearchSpace((TokenBudget(2048, 40000),), ("none",), engines)
    monkeypatch.setattr(search_module, "make_space", lambda _: space)
    keys, out = ["engine.name=fsdp"], tmp_path / "fast.yaml"
    slow = PlanOptions(gpu="h100", nodes=2, gpus_per_node=2, network_gb_s=0.1, as_json=True)
    assert run_plan(recipe, keys, replace(slow, search=True, write=out)) == EXIT_DONE
    said = json.loads(capsys.readouterr().out)
    assert any(note.startswith("engine.frozen=resident") for note in said["assumed"])
    written = load_config(out)
    assert written.data.pack_llm_tokens == 2048 and written.engine.frozen == "auto"
    before = make_planner(recipe, keys, slow)
    assert before.config.engine.frozen == "resident"
    seconds = before.compute_time(before.config).total
    assert said["search"]["step_seconds_before"] == pytest.approx(seconds)


@pytest.mark.slow
def test_auto_budgets_are_those_that_suit_a_start(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = make_planner(recipe, ["engine.name=fsdp"], H100)
    fastest = search_budget(planner)

    def refuse_fastest(before: RunConfig, after: RunConfig, memory: MemoryPlan) -> bool:
        return before is planner.config and memory.fits and read_budget(after.data) != fastest

    monkeypatch.setattr(search_module, "suits_start", refuse_fastest)
    assert search_budget(planner) != fastest


@pytest.mark.seconds
def test_a_start_leaves_room_beside_what_nobody_asked_for(recipe: Path) -> None:
    planner = make_planner(recipe, ["engine.name=fsdp", "engine.frozen=resident"], H100)
    resident = planner.config
    auto, sharded = (vary(resident, {"engine.frozen": frozen}) for frozen in ("auto", "sharded"))
    memory = planner.compute_memory(resident)
    for share, fits in ((0.89, True), (0.95, False)):
        full = replace(memory, capacity=memory.total / share)
        assert suits_start(auto, resident, full) is fits
        assert suits_start(resident, resident, full) and suits_start(auto, sharded, full)
    assert not suits_start(resident, resident, replace(memory, capacity=memory.total * 0.99))
