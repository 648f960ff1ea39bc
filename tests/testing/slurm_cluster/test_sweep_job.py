"""A sweep under a real Slurm: each run of the array stops, requeues and ends by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from onellm_dist.common.run_files import EXIT
from onellm_dist.config.load import load_config
from onellm_dist.config.recipe_files import find_recipe
from onellm_dist.launch.slurm.attempts import read_attempts
from onellm_dist.launch.slurm.script import render
from onellm_dist.launch.slurm.submit import make_job
from onellm_dist.testing.slurm_cluster import requirements
from onellm_dist.testing.slurm_cluster.cluster import Cluster
from onellm_dist.testing.slurm_cluster.comparison import read_metrics
from onellm_dist.testing.slurm_cluster.toy_size import (
    STEPS,
    TOY_RECIPE,
    build_toy_data,
    make_toy_overrides,
)

MISSING = requirements.find_missing()
PATIENCE_S = 400.0
RATES = ("1e-3", "2e-3")


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, f"no {what} after {PATIENCE_S:.0f} s"
        time.sleep(0.2)


@pytest.mark.skipif(bool(MISSING), reason=f"no throw-away Slurm here: {MISSING}")
@pytest.mark.slow
def test_a_run_that_stops_requeues_alone(tmp_path: Path) -> None:
    toy = make_toy_overrides(TOY_RECIPE, [], ranks=1, data=tmp_path / "toy")
    build_toy_data(TOY_RECIPE, toy, tmp_path / "toy")
    job = make_job(
        find_recipe(TOY_RECIPE).resolve(),
        [*toy, f"run.dir={tmp_path}/a sweep", "optim.min_lr=0"],
        nodes="1",
        array=[f"optim.lr={','.join(RATES)}"],
        gpus_per_node=1,
        ranks_per_node=1,
        name="sweep",
        time="60",
    )
    runs = [task.run_dir for task in job.sweep]
    script = tmp_path / "sweep.sbatch"
    script.write_text(render(job))
    with Cluster(2) as cluster:
        cluster.env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        number = cluster.submit(script, cwd=tmp_path)
        last = f"{number}_{len(runs) - 1}"  # Slurm gives it the number of the array
        wait_until(lambda: len(read_metrics(runs[-1])) > 1, "step")
        cluster.run("scancel", "--batch", "--signal=USR1", last)
        wait_until(lambda: len(read_attempts(runs[-1])) > 1, "second start")
        wait_until(
            lambda: all(read_attempts(run)[-1].action == "done" for run in runs), "end of both"
        )
    assert [[a.action for a in read_attempts(run)] for run in runs] == [
        ["done"],
        ["requeue", "done"],
    ]
    for run, rate in zip(runs, RATES, strict=True):
        assert json.loads((run / EXIT).read_text())["status"] == "done"
        assert load_config(run / "config.yaml").optim.lr == float(rate)
        assert [line["step"] for line in read_metrics(run)] == list(range(STEPS))
    first, second = (read_metrics(run)[0] for run in runs)
    assert first["sample_digest"] == second["sample_digest"]
    assert first["loss"] == second["loss"], "the runs differ in their rate alone"
    logs = {path.name for path in tmp_path.glob("*.log")}
    assert logs == {f"sweep-{number}_{task}.log" for task in range(len(runs))}
