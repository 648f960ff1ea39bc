"""What a rank holds at 1 and 4 ranks: never the whole model, and a quarter of the state."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from zygote import run_ranks

from onellm_dist.config.schema import EngineSection
from onellm_dist.planner.memory import ParameterCounts, compute_state
from onellm_dist.train.engine.select import get_engine

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "engines.py"
ENGINES = ("zero3", "fsdp")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Engine -> number of ranks -> what benchmarks/engines.py measures there."""
    measures: dict[str, Any] = {}
    for engine in ENGINES:
        for ranks in (1, 4):
            out = tmp_path_factory.mktemp("memory")
            own = ["--worker", str(out), "--engines", engine, "--steps", "1"]
            run_ranks(BENCHMARK, own, ranks)
            measures.setdefault(engine, {})[str(ranks)] = json.loads(
                (out / "found.json").read_text()
            )
    return measures


@pytest.mark.parametrize("engine", ENGINES)
def test_no_rank_ever_holds_the_whole_model(found: dict[str, Any], engine: str) -> None:
    """Peak growth while a frozen model of 146 MB is drawn, read, sharded and exported."""
    one = found[engine]["4"]
    assert one["model_bytes"] > 140e6
    assert one["load"] < 0.5 * one["model_bytes"]
    assert one["export"] < 0.25 * one["model_bytes"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_that_training_waits_for_is_no_copy(
    found: dict[str, Any], engine: str
) -> None:
    for one in found[engine].values():
        assert one["save"] < 0.1 * one["state"]


@pytest.mark.parametrize("engine", ENGINES)
def test_four_ranks_hold_a_quarter_of_the_state_each(found: dict[str, Any], engine: str) -> None:
    assert found[engine]["4"]["state"] < 0.35 * found[engine]["1"]["state"]
    assert found[engine]["1"]["state"] > 12 * found[engine]["1"]["trained_weights"]


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_planner_predicts_what_a_rank_holds(
    found: dict[str, Any], engine: str, ranks: int, tmp_path: Path
) -> None:
    """After a step, in fp32; DeepSpeed keeps the memory of gradients then, FSDP2 does not."""
    given = runpy.run_path(str(BENCHMARK))["ENGINES"][engine]
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps(given))
    section = EngineSection(name="fsdp") if given is None else EngineSection(config=config)
    measured = found[engine][str(ranks)]
    trained = int(measured["trained_weights"])
    state = compute_state(
        get_engine(section.name),
        section,
        ParameterCounts(int(measured["model_bytes"]) // 4 - trained, trained, 0),
        world_size=ranks,
        compute_bytes=4,
        state_bytes=12,
    )
    held = state.device - (state.gradients if given is None else 0)
    assert measured["state"] == pytest.approx(held, rel=0.1)
