"""The recipe of stage 1 at toy size on 16 ranks: the stream and the update of one rank."""

from __future__ import annotations

import math

import pytest
from torch import Tensor
from toy_runs import Runs

from onellm_dist.model import load_model

BATCH, STEPS = 5120, 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With the run of one rank that both engines are held against."""
    runs = Runs(
        tmp_path_factory.mktemp("sixteen"),
        ("image",),
        256,
        "stage1_image",
        model__preset="toy",
        data__pack_encoder_tokens=8192,
        data__global_batch=BATCH,
        train__steps=STEPS,
        engine__config="cpu",
        checkpoint__every=STEPS,
    )
    runs.run("one", 1)
    return runs


@pytest.mark.soak
@pytest.mark.timeout(7000)
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_three_steps_of_sixteen_ranks_equal_those_of_one(runs: Runs, engine: str) -> None:
    runs.run(engine, 16, engine__name=engine)
    one, sixteen = runs.metrics("one"), runs.metrics(engine)
    assert sorted(one) == sorted(sixteen) == list(range(STEPS))
    for step in one:
        assert sixteen[step]["samples"] == BATCH
        assert sixteen[step]["sample_digest"] == one[step]["sample_digest"]
        assert sixteen[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5)
    before = load_model(path=None, preset="toy", seed=0)[0].state_dict()
    ends = [runs.exported(name) for name in ("one", engine)]
    trained = [n for n in ends[0] if n.startswith(("projectors.image.", "upm."))]
    update = distance({n: ends[0][n] for n in trained}, before)
    assert update > 0
    assert distance({n: ends[0][n] for n in trained}, ends[1]) < 1e-3 * update


def distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """L2 norm of the difference over all tensors of `some`."""
    squares = (float((tensor - others[name]).square().sum()) for name, tensor in some.items())
    return math.sqrt(sum(squares))
