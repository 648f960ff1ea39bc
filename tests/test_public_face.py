"""What `onellm_dist` offers to Python: every name, lazily, and training in the calling process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import onellm_dist
from onellm_dist import build_dataset

ROOT = Path(__file__).parents[1]
TWO_STEPS = """
import os, signal
from onellm_dist import Trainer, load_config

before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
for name in ("one", "two"):
    overrides = ["data.root=toy", "data.global_batch=4", "train.steps=2", f"run.dir={name}"]
    outcome = Trainer.from_config(load_config("toy/align_image", overrides)).fit()
    assert outcome.status == "done" and outcome.steps_done == 2, outcome
    assert os.path.isfile(f"{name}/model/config.json")
assert before == {number: signal.getsignal(number) for number in before}
import torch
assert not torch.distributed.is_initialized()
print("the process goes on")
"""


def test_every_public_name_is_there() -> None:
    assert all(getattr(onellm_dist, name) is not None for name in onellm_dist.__all__)
    assert set(onellm_dist.__all__) <= set(dir(onellm_dist))
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        onellm_dist.Trainr  # noqa: B018 (the look-up is what is tested)


@pytest.mark.slow
def test_two_runs_train_in_one_process_which_then_goes_on(tmp_path: Path) -> None:
    build_dataset("toyworld", None, tmp_path / "toy", options={"train": 8, "test": 2})
    done = subprocess.run(
        [sys.executable, "-c", TWO_STEPS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("the process goes on")
