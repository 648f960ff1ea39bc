"""`onellm launch --array`: the runs of a sweep, and the one job script of all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onellm_dist.cli import app
from onellm_dist.common.errors import UsageError
from onellm_dist.config.load import load_config
from onellm_dist.launch.arguments import decode_argument
from onellm_dist.launch.slurm.attempts import read_attempts
from onellm_dist.launch.slurm.job import STARTERS, SlurmJob
from onellm_dist.launch.slurm.script import render
from onellm_dist.launch.slurm.submit import make_job
from onellm_dist.launch.slurm.sweep import MOST_TASKS, make_sweep, parse_sweep

RECIPE = Path("toy/align_image")
MIXTURES = "data.mixture=[{path: a, weight: 1}, {path: b c}],[{path: d}]"
TOOLS = {
    "python": f"""
case "$*" in
*onellm_dist.train*) printf '%s\\n' "${{@:4}}" >"$CALLS/train" ;;
*) exec {sys.executable} "$@" ;;
esac
""",
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "deepspeed": """
while [ "$1" != --module ]; do shift; done
printf '%s\\n' "${@:3}" >"$CALLS/train"
""",
    "pdsh": "exit 0",
    "scontrol": '[ "$1" = show ] && echo n1 || echo "$*" >>"$CALLS/scontrol"',
    # Of a whole array it would list every task.
    "squeue": 'echo RUNNING; case "$*" in *"--job 7_1 "*) ;; *) echo RUNNING ;; esac',
}


def make(array: list[str], *overrides: str, starter: str = "srun") -> SlurmJob:
    return make_job(
        RECIPE, overrides, nodes="1", array=array, gpus_per_node=1, starter=starter, python="python"
    )


def run_task(job: SlurmJob, folder: Path, task: str | None) -> subprocess.CompletedProcess[str]:
    """Run a job script as Slurm runs a task of an array, with small scripts for its tools."""
    tools = folder / "tools"
    tools.mkdir()
    for name, body in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
        "PATH": f"{tools}:{os.environ['PATH']}",
        "CALLS": str(folder),
        "SLURM_JOB_ID": "7",  # the array's own id is also that of its last task
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        **({} if task is None else {"SLURM_ARRAY_TASK_ID": task}),
    }
    return subprocess.run(
        ["bash", "-c", render(job)],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_every_combination_is_a_run() -> None:
    assert parse_sweep(["optim.lr=1e-5, 2e-5", "run.seed=0,1"]) == [
        ("optim.lr=1e-5", "run.seed=0"),
        ("optim.lr=1e-5", "run.seed=1"),
        ("optim.lr=2e-5", "run.seed=0"),
        ("optim.lr=2e-5", "run.seed=1"),
    ]
    assert parse_sweep(["optim.lr=1"]) == [("optim.lr=1",)]


def test_commas_in_brackets_and_quotes_belong_to_a_value() -> None:
    assert parse_sweep([MIXTURES]) == [
        ("data.mixture=[{path: a, weight: 1}, {path: b c}]",),
        ("data.mixture=[{path: d}]",),
    ]
    assert parse_sweep(["track.options.wandb.name='a, b',c"]) == [
        ("track.options.wandb.name='a, b'",),
        ("track.options.wandb.name=c",),
    ]


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (["optim.lr"], "is not KEY=VALUE"),
        (["=1,2"], "is not KEY=VALUE"),
        (["optim.lr="], "is not KEY=VALUE"),
        (["optim.lr=1e-5,,2e-5"], "is not KEY=VALUE"),
        (["optim.lr=1e-5,1e-5"], "the same run twice"),
        (["optim.lr=1", "optim.lr=2"], "swept twice"),
        (["track.project=it's,hers"], "is not closed"),
        (["data.mixture=[{path: a},{path: b}"], "is not closed"),
        (["run.dir=a,b"], "a directory of its own"),
        ([f"run.seed={','.join(map(str, range(MOST_TASKS + 1)))}"], "1001 combinations"),
    ],
)
def test_a_wrong_sweep_is_refused(items: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_sweep(items)


def test_the_recipe_is_checked_with_the_values_of_each_run() -> None:
    with pytest.raises(UsageError, match=r"optim\.lr"):
        make(["optim.lr=1e-3,0"])
    with pytest.raises(UsageError, match=r"did you mean optim\.lr"):
        make(["optim.lrr=1,2"])


def test_each_run_has_a_directory_of_its_own() -> None:
    tasks = make_sweep(RECIPE, ["run.dir=/x/s"], ["optim.lr=1e-3,2e-3", "run.seed=0,1"])
    assert [task.run_dir.name for task in tasks] == [
        "optim.lr=1e-3_run.seed=0",
        "optim.lr=1e-3_run.seed=1",
        "optim.lr=2e-3_run.seed=0",
        "optim.lr=2e-3_run.seed=1",
    ]
    for task in tasks:
        config = load_config(RECIPE, ["run.dir=/x/s", *task.overrides])
        assert config.run.dir == task.run_dir and task.run_dir.parent == Path("/x/s")
    alike = make_sweep(RECIPE, [], ["data.mixture=[{path: a}],[{path: a }]"])
    assert [task.run_dir.name[:2] for task in alike] == ["0-", "1-"]
    long = make_sweep(RECIPE, [], [f"track.project={'a' * 300},{'b' * 300}"])
    assert [task.run_dir.name for task in long] == ["run-0", "run-1"]
    assert make_sweep(RECIPE, [], []) == []


@pytest.mark.parametrize("starter", STARTERS)
def test_a_task_trains_with_its_own_values(tmp_path: Path, starter: str) -> None:
    job = make([MIXTURES, "optim.lr=2e-3,3e-3"], "train.steps=5", starter=starter)
    text = render(job)
    assert "\n#SBATCH --array=0-3 " in text and "\n#SBATCH --output=%x-%A_%a.log" in text
    done = run_task(job, tmp_path, "1")
    given = [decode_argument(line) for line in (tmp_path / "train").read_text().splitlines()]
    wanted = [str(RECIPE), "train.steps=5", *job.sweep[1].overrides]
    assert given[-len(wanted) :] == wanted or given[: len(wanted)] == wanted, done.stderr
    assert "optim.lr=3e-3" in given and "data.mixture=[{path: a, weight: 1}, {path: b c}]" in given
    assert [a.job_id for a in read_attempts(tmp_path / job.sweep[1].run_dir)] == ["7"]


def test_a_task_requeues_itself_and_not_the_array(tmp_path: Path) -> None:
    done = run_task(make(["optim.lr=2e-3,3e-3"]), tmp_path, "1")
    assert (tmp_path / "scontrol").read_text().splitlines() == [
        "requeue 7_1",
        "update JobId=7_1 StartTime=now+60",
    ], done.stderr


@pytest.mark.parametrize(("task", "problem"), [(None, "it is an array"), ("2", "no task 2")])
def test_a_script_without_its_task_starts_nothing(
    tmp_path: Path, task: str | None, problem: str
) -> None:
    done = run_task(make(["optim.lr=2e-3,3e-3"]), tmp_path, task)
    assert done.returncode and problem in done.stderr
    assert not (tmp_path / "train").exists() and not (tmp_path / "runs").exists()


def test_the_command_writes_one_script(tmp_path: Path) -> None:
    out = tmp_path / "sweep.sbatch"
    line = ["launch", str(RECIPE), "--gpus-per-node", "1", "--set", f"run.dir={tmp_path}/s"]
    done = CliRunner().invoke(app, [*line, "--array", "optim.lr=2e-3,3e-3", "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert "# 2 runs of recipe toy/align_image, each on 1 node with 1 rank" in text
    assert f"run_dir={tmp_path}/s/optim.lr=3e-3\n" in text
