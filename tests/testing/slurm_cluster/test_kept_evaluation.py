"""Kept checkpoints under a real Slurm: the run's job submits their job, and its scores arrive."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from benchmark_trees import write_benchmark
from typer.testing import CliRunner

from onellm_dist.cli import app
from onellm_dist.common.run_files import EVALUATION, EXIT, VALIDATION
from onellm_dist.launch.slurm.attempts import read_attempts
from onellm_dist.shards import build_dataset
from onellm_dist.testing.slurm_cluster import requirements
from onellm_dist.testing.slurm_cluster.cluster import Cluster
from onellm_dist.testing.slurm_cluster.toy_size import (
    STEPS,
    TOY_RECIPE,
    build_toy_data,
    make_toy_overrides,
)

MISSING = requirements.find_missing(ssh=False)
PATIENCE_S = 600.0
KEPT = 8


def read_scores(run: Path) -> list[dict[str, Any]]:
    path = run / VALIDATION
    lines = path.read_text().splitlines() if path.is_file() else []
    return [entry for entry in map(json.loads, lines) if "tasks" in entry]


@pytest.mark.skipif(bool(MISSING), reason=f"no throw-away Slurm here: {MISSING}")
@pytest.mark.soak
def test_kept_checkpoints_answer_in_a_job_of_their_own(tmp_path: Path) -> None:
    run, benchmarks = tmp_path / "a run", tmp_path / "benchmarks"
    inputs = write_benchmark(tmp_path / "in", "mme")
    build_dataset("mme-eval", inputs, benchmarks / "mme-eval", options={"any_count": True})
    toy = make_toy_overrides(TOY_RECIPE, [], ranks=1, data=tmp_path / "toy")
    build_toy_data(TOY_RECIPE, toy, tmp_path / "toy")
    section = f"split: test_seen, samples: 1, every: {STEPS}, tasks: [mme]"
    keys = [key for key in toy if not key.startswith("data.validation=")]
    keys += [f"data.validation={{{section}, tasks_data: {benchmarks}}}", f"run.dir={run}"]
    keys.append(f"checkpoint.keep_every={KEPT}")
    script = tmp_path / "job.sbatch"
    arguments = ["launch", str(TOY_RECIPE), *(x for key in keys for x in ("--set", key))]
    arguments += ["--gpus-per-node", "1", "--job-name", "train", "--time", "60"]
    written = CliRunner().invoke(app, [*arguments, "--out", str(script)])
    assert written.exit_code == 0, written.output
    with Cluster(1) as cluster:
        cluster.env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        number = cluster.submit(script, cwd=tmp_path)
        deadline, names = time.monotonic() + PATIENCE_S, set[str]()
        while not (len(read_scores(run)) == 2 and read_attempts(run / EVALUATION)[-1].end):
            listed = cluster.run("squeue", "--noheader", "--format=%j").stdout
            names |= set(listed.splitlines())
            logs = "\n".join(p.read_text()[-2000:] for p in tmp_path.glob("*.log"))
            assert time.monotonic() < deadline, f"no scores after {PATIENCE_S:.0f} s\n{logs}"
            time.sleep(0.5)
    assert json.loads((run / EXIT).read_text())["status"] == "done"
    assert names == {"train", "evaluate-a_run"}
    first, last = read_scores(run)
    assert (first["steps_done"], last["steps_done"]) == (KEPT, STEPS)
    for entry in (first, last):
        perception = entry["tasks"]["mme"]["perception"]
        assert perception["n"] == 6 and 0 <= perception["value"] <= 400
    (attempt,) = read_attempts(run / EVALUATION)
    assert (attempt.status, attempt.action) == ("done", "done")
    assert attempt.job_id != str(number)
