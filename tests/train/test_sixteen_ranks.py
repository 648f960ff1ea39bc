"""Sixteen ranks on one machine (about 14 GB): the paper's stage I at toy width, 5120 samples a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_runs import Runs

from onellm_dist.model import load_model

BATCH, STEPS = 5120, 3


@pytest.mark.soak
@pytest.mark.timeout(7000)
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_three_steps_of_sixteen_ranks_equal_those_of_one(tmp_path: Path, engine: str) -> None:
    runs = Runs(
        tmp_path, ("image",), 256, "stage1_image", model__preset="toy", data__pack_encoder_tokens=8192, data__global_batch=BATCH,
        train__steps=STEPS, engine__config="cpu", engine__name=engine, checkpoint__every=STEPS,
    )  # fmt: skip
    runs.run("sixteen", 16)
    runs.run("one", 1)
    one, sixteen = runs.metrics("one"), runs.metrics("sixteen")
    assert sorted(one) == sorted(sixteen) == list(range(STEPS))
    for step in one:
        assert sixteen[step]["samples"] == BATCH
        assert sixteen[step]["sample_digest"] == one[step]["sample_digest"]
        assert sixteen[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5)
    before = load_model(path=None, preset="toy", seed=0)[0].state_dict()
    ends = [runs.exported(name) for name in ("one", "sixteen")]
    trained = [n for n in ends[0] if n.startswith(("projectors.image.", "upm."))]
    gap = sum(float((ends[0][n] - ends[1][n]).square().sum()) for n in trained) ** 0.5
    update = sum(float((ends[0][n] - before[n]).square().sum()) for n in trained) ** 0.5
    assert gap + update > 0 and gap < 1e-3 * update
