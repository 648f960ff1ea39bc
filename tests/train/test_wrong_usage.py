"""Recipes that cannot run: one message that names the key, exit code 2, and nothing is trained."""

from __future__ import annotations

from typing import Any

import pytest
from align_runs import Runner, make_runner

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return make_runner(tmp_path_factory.mktemp("usage"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train__stepz": 3}, "did you mean train.steps"),
        ({"model__path": "no/such/model"}, "no/such/model"),
        ({"checkpoint__resume": "no/such/step"}, "no complete checkpoint"),
        ({"engine__config": "zero9"}, "zero3_hpz"),
        (
            {"engine__name": "fsdp", "engine__shard_ranks": 3},
            "engine.shard_ranks=3 does not divide",
        ),
        ({"engine__shard_ranks": 2}, "engine.name=fsdp"),
        ({"data__root": "no/such/shards"}, "no/such/shards"),
    ],
)
def test_wrong_usage_is_refused_with_exit_code_two(
    runner: Runner, keys: dict[str, Any], message: str
) -> None:
    name = "wrong_" + next(iter(keys))
    start = runner.run if "train__stepz" in keys else runner.fork
    code, output = start(name, 1, **keys)
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output
    assert runner.exit(name)["status"] == "usage"
    assert not (runner.out / name / "checkpoints").exists()
