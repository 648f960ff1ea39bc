"""A crash loop under a real Slurm: the job halts, and what its message says to do ends the run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from forked_python import get_programs
from small_onellm import get_small_keys

from onellm_dist.common.run_files import EXCLUDE_LIST
from onellm_dist.config.load import load_config
from onellm_dist.config.recipe_files import find_recipe
from onellm_dist.data.plan import Plan
from onellm_dist.launch.slurm.script import render
from onellm_dist.launch.slurm.submit import make_job
from onellm_dist.model.weights.lazy import open_model
from onellm_dist.testing.slurm_cluster import requirements
from onellm_dist.testing.slurm_cluster.cluster import Cluster
from onellm_dist.testing.slurm_cluster.comparison import read_metrics
from onellm_dist.testing.slurm_cluster.rehearse import PATIENCE_S
from onellm_dist.testing.slurm_cluster.running_job import RunningJob
from onellm_dist.testing.slurm_cluster.toy_size import (
    CHECKPOINT_EVERY,
    STEPS,
    TOY_RECIPE,
    build_toy_data,
    make_toy_overrides,
)
from onellm_dist.train.sample_log.stream import RunStream

MISSING = requirements.find_missing(ssh=False)
RANKS = 2
BAD_STEP = 6
PLANT = '''
"""A sample over which the step itself fails, as over a kernel's assertion: no sandbox is there."""

from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.engine.deepspeed.engine import DeepSpeedEngine

forward = DeepSpeedEngine.forward


def fail(self, batch, *, last):
    for place, name in enumerate(batch.sample_ids):
        if name == "SAMPLE" and place not in batch.skipped_samples:
            raise RuntimeError("device-side assert triggered (planted)")
    return forward(self, batch, last=last)


class Planted(Callback):
    def on_fit_start(self):
        DeepSpeedEngine.forward = fail
'''


@pytest.mark.skipif(bool(MISSING), reason=f"no throw-away Slurm here: {MISSING}")
@pytest.mark.slow
def test_the_commands_of_a_crash_loops_message_lead_to_the_end_of_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"  # the message quotes it
    toy = make_toy_overrides(TOY_RECIPE, [], ranks=RANKS, data=tmp_path / "toy")
    build_toy_data(TOY_RECIPE, toy, tmp_path / "toy")
    small = [f"{key.replace('__', '.')}={value}" for key, value in get_small_keys().items()]
    keys = [*toy, *small, "train.callbacks=[planted_step:Planted]", f"run.dir={run_dir}"]
    bad = find_sample(keys)
    (tmp_path / "planted_step.py").write_text(PLANT.replace("SAMPLE", bad))
    script = tmp_path / "job.sbatch"
    recipe = find_recipe(TOY_RECIPE).resolve()
    job_script = make_job(
        recipe, keys, nodes="1", gpus_per_node=RANKS, ranks_per_node=RANKS, name="loop", time="60"
    )
    script.write_text(render(job_script))
    with Cluster(1) as cluster:
        cluster.env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

        def submit() -> RunningJob:
            cluster.wait_for_nodes(cluster.nodes)
            return RunningJob(
                cluster, script, run_dir, name="loop", cwd=tmp_path, patience_s=PATIENCE_S
            )

        job = submit()
        job.wait_for_requeue(1)
        job.start_soon()
        assert job.wait_for_end() == "FAILED"
        attempts = job.read_attempts()
        assert [a.action for a in attempts] == ["requeue", "halt"]
        assert {(a.status, a.failed_step, a.checkpoint) for a in attempts} == {
            ("failed", BAD_STEP, CHECKPOINT_EVERY)
        }
        named = follow_message(job.log.read_text(), run_dir)
        assert bad in named
        again = submit()
        assert again.wait_for_end() == "COMPLETED", again.read_log_tail()
        assert [a.status for a in again.read_attempts()] == ["done"]
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(STEPS))
    assert find_listed(run_dir) == find_uses(run_dir, {name.rpartition("@")[0] for name in named})


def find_sample(keys: list[str]) -> str:
    """The id of a sample of the bad step."""
    config = load_config(TOY_RECIPE, keys)
    model, processor, _ = open_model(path=config.model.path, preset=None, seed=config.run.seed)
    plan = Plan.open(
        config.data, processor.tokenizer, config.run.seed, list(model.config.modalities), show=False
    )
    samples = plan.step(BAD_STEP, RANKS).ranks[1][0].samples
    return plan.corpus.sample_ids(samples)[-1]


def follow_message(log: str, run_dir: Path) -> list[str]:
    """Run the commands of the message as they stand there; return the samples that it names."""
    message = log[log.index(f"halted: two starts failed at step {BAD_STEP}; another one would") :]
    assert "Now: RuntimeError: device-side assert triggered (planted)" in message
    commands = [line.strip() for line in message.splitlines() if line.startswith("  onellm ")]
    assert "Then submit the job again: it resumes from the latest checkpoint." in message
    previews, (exclude,) = commands[:-1], commands[-1:]
    assert previews and all(line.startswith("onellm shards preview ") for line in previews)
    env = {**os.environ, "PATH": f"{get_programs()}{os.pathsep}{os.environ['PATH']}"}
    for line in commands:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=run_dir.parent,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    words = shlex.split(exclude)
    assert words[:4] == ["onellm", "samples", "exclude", str(run_dir)]
    entries = (run_dir / EXCLUDE_LIST).read_text().splitlines()
    assert entries == [name.rpartition("@")[0] for name in words[4:]]
    return words[4:]


def find_listed(run_dir: Path) -> set[tuple[int, str]]:
    """(step, sample id) of every use that the sample log has as left out by a list."""
    return {
        (line["step"], line["sample_id"])
        for path in (run_dir / "samples").glob("listed-*.jsonl")
        for line in map(json.loads, path.read_text().splitlines())
    }


def find_uses(run_dir: Path, names: set[str]) -> set[tuple[int, str]]:
    """(step, sample id) of every use of some samples, after the checkpoint that was resumed."""
    stream = RunStream(run_dir)
    return {
        (step, use.sample_id)
        for step in range(CHECKPOINT_EVERY, STEPS)
        for use in stream.list_samples(step)
        if use.sample.name in names
    }
