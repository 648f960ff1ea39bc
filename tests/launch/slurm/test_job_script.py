"""Job scripts: what `onellm launch` renders, refuses, writes and submits."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from onellm_dist.cli import app
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.resources import recipes_dir
from onellm_dist.launch.slurm.examples import render_examples
from onellm_dist.launch.slurm.job import SlurmJob, check_job, parse_nodes, parse_time_limit
from onellm_dist.launch.slurm.script import render
from onellm_dist.launch.slurm.submit import check_script, make_job

JOB = SlurmJob(
    recipe="tune",
    run_dir=Path("runs/x"),
    nodes=(2, 2),
    gpus_per_node=4,
    ranks_per_node=4,
    name="tune",
)


def make_variant(**fields: Any) -> SlurmJob:
    return dataclasses.replace(JOB, **fields)


def test_the_shipped_scripts_are_up_to_date() -> None:
    folder = recipes_dir().parent / "slurm"
    shipped = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.sbatch")}
    assert shipped == render_examples(), "run: python -m onellm_dist.launch.slurm.examples"
    assert {
        "stage1_image.sbatch",
        "stage2_video_audio_point.sbatch",
        "stage3_all.sbatch",
        "tune.sbatch",
        "generic.sbatch",
    } == set(shipped)


@pytest.mark.parametrize(
    ("starter", "container"),
    [
        ("deepspeed", ""),
        *(
            (starter, container)
            for starter in ("srun", "torchrun")
            for container in ("", "pyxis", "apptainer")
        ),
    ],
)
def test_every_variant_is_bash_and_starts_the_recipe_once(starter: str, container: str) -> None:
    job = make_variant(
        starter=starter,
        container="a b.sif" if container else "",
        container_runtime=container or "pyxis",
        overrides=("run.dir=/a b", "x=$y"),
    )
    check_job(job)
    text = render(job)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    arguments = r"'run\.dir=/a b' 'x=\$y'"
    if starter == "deepspeed":
        arguments = "url:run.dir=/a%20b url:x=%24y"
    training = rf"onellm_dist\.train tune {arguments}(; \}})? &\nranks=\$!"
    assert len(re.findall(training, text)) == 1
    assert ("in_container" in text) == bool(container)
    assert all(len(line) <= 140 for line in text.splitlines())


def test_the_preflight_stands_before_the_ranks_and_its_bad_nodes_are_excluded() -> None:
    text = render(make_variant(preflight=True))
    doctor, ranks, after = (
        text.index(word)
        for word in ("doctor --distributed", "onellm_dist.train tune", "launch.slurm.after end")
    )
    assert doctor < ranks < after and "ExcNodeList" in text[after:] and "--preflight-status" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "preflight" not in render(JOB)


def test_the_header_has_every_option() -> None:
    text = render(
        make_variant(
            nodes=(1, 4),
            partition="gpu",
            account="a",
            qos="q",
            exclude="gpu[07,12]",
            time="2-0",
            grace_period_s=600,
        )
    )
    options = (
        "--nodes=1-4 --gpus-per-node=4 --partition=gpu --account=a --qos=q --exclude=gpu[07,12] "
        "--time=2-0 --requeue --open-mode=append --signal=B:USR1@600 --exclusive"
    )
    for option in options.split():
        assert f"\n#SBATCH {option}" in text, option
    # Slurm would keep the task count of the last start: a requeued job could not come back on
    # fewer nodes.
    assert "#SBATCH --ntasks" not in text
    shared = render(make_variant(cpus_per_rank=6, gpus_per_node=0))
    assert (
        "#SBATCH --cpus-per-task=24\n" in shared
        and "--exclusive" not in shared
        and "gpus" not in shared
    )
    assert "\n    --cpus-per-task=6 \\\n    python" in shared
    assert "\n    --cpus-per-task=24 \\\n    python" in render(
        make_variant(cpus_per_rank=6, starter="torchrun")
    )


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"starter": "mpirun"}, "--with"),
        ({"container_runtime": "docker"}, "--container-runtime"),
        ({"ranks_per_node": 0}, "--ranks-per-node"),
        ({"starter": "deepspeed", "container": "x"}, "ssh"),
        ({"time": "soon"}, "--time"),
        ({"time": "5"}, "--grace-period"),
        ({"grace_period_s": 0}, "--grace-period"),
        ({"partition": "a b"}, "--partition"),
        ({"name": "a;$(rm)"}, "--job-name"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        check_job(make_variant(**fields))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("0", 0),
    ],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["0", "3-2", "two", "1-", ""])
def test_wrong_node_counts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--nodes"):
        parse_nodes(text)
    assert parse_nodes("2") == (2, 2) and parse_nodes("1-4") == (1, 4)


def test_a_job_takes_its_run_directory_and_name_from_the_recipe(tmp_path: Path) -> None:
    assert make_job(Path("stage1_image"), [], nodes="2").run_dir == Path("runs/stage1_image")
    job = make_job(Path("stage1_image"), [f"run.dir={tmp_path}"], nodes="2", container="x")
    assert (job.run_dir, job.name, job.ranks_per_node, job.python) == (
        tmp_path,
        "stage1_image",
        8,
        "python",
    )
    assert job.mounts == (str(tmp_path),)
    with pytest.raises(UsageError, match=r"train\.stepz"):
        make_job(Path("stage1_image"), ["train.stepz=1"], nodes="2")


def write_tool(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_the_answer_of_slurm_decides(tools: Path) -> None:
    write_tool(tools, "scontrol", "echo 'Slurmctld(primary) at head is UP'")
    write_tool(
        tools,
        "sbatch",
        'grep -q "^#SBATCH --nodes=2" "${@: -1}" && echo "sbatch: Job 7 to start at noon" >&2',
    )
    assert "Job 7 to start at noon" in check_script(render(JOB))
    write_tool(tools, "sbatch", "echo 'invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(OneLLMError, match="invalid partition"):
        check_script(render(JOB))
    write_tool(tools, "scontrol", "exit 1")
    assert "no Slurm answers" in check_script(render(JOB))


def test_launch_writes_checks_and_submits(tools: Path, tmp_path: Path) -> None:
    write_tool(tools, "scontrol", "echo 'Slurmctld(primary) at head is UP'")
    write_tool(
        tools,
        "sbatch",
        f'[ "$1" != --parsable ] || {{ echo "$2" >{tmp_path}/submitted; echo "31;cluster"; }}',
    )
    run_dir = tmp_path / "run"
    line = [
        "launch",
        "toy/align_image",
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--set",
        f"run.dir={run_dir}",
    ]
    printed = CliRunner().invoke(app, line)
    assert printed.exit_code == 0 and "#SBATCH --nodes=2" in printed.output and not run_dir.exists()
    written = CliRunner().invoke(app, [*line, "--submit"])
    assert written.exit_code == 0 and "job 31" in written.output
    assert (tmp_path / "submitted").read_text().strip() == str(run_dir / "job.sbatch")
    assert f"run_dir={run_dir}\n" in (run_dir / "job.sbatch").read_text()
