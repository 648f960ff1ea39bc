"""`engine.frozen: auto` in a run: what the planner says reaches engine, recipe and events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_memory import write_constants
from small_onellm import get_small_keys
from toy_runs import Runs
from zygote import get_zygote

pytestmark = pytest.mark.slow
RANKS = 2


class FrozenRuns(Runs):
    """Starts of two ranks under FSDP2."""

    def start(self, cache: Path, steps: int, *more: str) -> None:
        keys = self.overrides(
            "run",
            engine__name="fsdp",
            engine__config="",
            data__global_batch=4,
            train__steps=steps,
            checkpoint__every=1,
            train__callbacks="[held_weights:HeldWeights]",
        )
        plant = {"environment": {"ONELLM_CACHE": str(cache)}}
        get_zygote().start(RANKS, [*keys, *more], plant).done()

    def held(self) -> list[dict[str, list[str]]]:
        files = [self.root / "run" / f"held-{rank}.json" for rank in range(RANKS)]
        return [json.loads(file.read_text()) for file in files]

    def events(self, event: str) -> list[dict[str, Any]]:
        lines = (self.root / "run" / "events.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def written(self) -> str:
        found: str = yaml.safe_load((self.root / "run" / "config.yaml").read_text())["engine"][
            "frozen"
        ]
        return found


def test_a_run_keeps_frozen_weights_where_its_planner_says(tmp_path: Path) -> None:
    """Then on devices without constants, and then where the recipe says it.

    What each start decides for itself is not a change of the recipe.
    """
    runs = FrozenRuns(tmp_path, ("image",), 8, **get_small_keys())
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    write_constants(known, node_bus_gb_s=1e-4)  # so slow that the traffic of a small model counts
    runs.start(known, 1)
    assert runs.held() == [{"frozen": ["whole"], "trained": ["sharded"]}] * RANKS
    assert runs.written() == "resident"
    runs.start(unknown, 2)
    assert runs.held() == [{"frozen": ["sharded"], "trained": ["sharded"]}] * RANKS
    assert runs.written() == "auto"
    runs.start(known, 3)
    runs.start(known, 4, "engine.frozen=sharded")
    first, second, third, last = runs.events("start")
    assert [each["first_step"] for each in (first, second, third, last)] == [0, 1, 2, 3]
    assert first["frozen"] == third["frozen"] == "resident" and "they fit" in first["frozen_reason"]
    assert second["frozen"] == "sharded" and "has no constants for" in second["frozen_reason"]
    assert last["frozen"] == "sharded" and last["frozen_reason"] is None
    changes = [[c["key"] for c in each["changes"]] for each in runs.events("config_changed")]
    assert changes == [["train.steps"], ["train.steps"], ["train.steps", "engine.frozen"]]
