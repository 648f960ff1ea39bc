"""The throw-away Slurm: it runs job scripts as a cluster does, and leaves nothing behind.

The ranks are small shell scripts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.common.errors import OneLLMError
from onellm_dist.launch.slurm.job import STARTERS, SlurmJob
from onellm_dist.launch.slurm.script import render
from onellm_dist.testing.slurm_cluster import requirements
from onellm_dist.testing.slurm_cluster.cluster import Cluster
from onellm_dist.testing.slurm_cluster.folders import PREFIX
from onellm_dist.testing.slurm_cluster.running_job import RunningJob

MISSING = requirements.find_missing(ssh=True)
needs_slurm = pytest.mark.skipif(bool(MISSING), reason=f"no throw-away Slurm here: {MISSING}")
PATIENCE_S = 120.0

FAKE_RANK = """#!/bin/bash
# In place of `python -m onellm_dist.train`: rank 0 ends as the next line of `plan` in the run
# directory says. Anything else is run by Python.
for word in "$@"; do
    [ "$word" != onellm_dist.train ] || train=1
    [ "${word#run.dir=}" = "$word" ] || run="${word#run.dir=}"
done
[ -n "${train:-}" ] || exec PYTHON "$@"
[ "$SLURM_PROCID" = 0 ] || { touch "$run/met.$SLURM_PROCID"; while :; do sleep 0.1; done; }
# As real ranks do, they meet first: Slurm (22.05) does not end a task that is only just starting.
until [ "$(ls "$run" | grep -c '^met')" -ge "$((SLURM_STEP_NUM_TASKS - 1))" ]; do sleep 0.05; done
rm -f "$run"/met.*
line=$(head -n 1 "$run/plan"); sed -i 1d "$run/plan"
case "$line" in
    wait)
        trap 'exit 143' TERM
        touch "$run/waits"
        until [ -e "$run/stop" ]; do sleep 0.1; done
        echo '{"status": "preempted", "steps_done": 7, "reason": "stop"}' >"$run/exit.json"
        exit 75 ;;
    vanish) exit 9 ;;
    *) echo "$line" >"$run/exit.json"; exit 1 ;;
esac
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if MISSING:
        pytest.skip(MISSING)
    with Cluster(2) as cluster:
        yield cluster


APPTAINER = """#!/bin/bash
# In place of apptainer: drops its options and runs the command here.
[ "$1" = exec ] && shift
while [ "${1#--}" != "$1" ]; do
    case "$1" in --bind | --pwd) shift 2 ;; *) shift ;; esac
done
[ "$1" = "an image.sif" ] && shift && exec "$@"
"""


def submit(
    cluster: Cluster,
    folder: Path,
    *plan: str,
    time: str = "10",
    env: dict[str, str] | None = None,
    **fields: Any,
) -> RunningJob:
    """A job of two nodes with a fake rank each, whose starts end as `plan` says."""
    python = folder / "python"
    python.write_text(FAKE_RANK.replace("PYTHON", sys.executable))
    python.chmod(0o755)
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "plan").write_text("\n".join(plan) + "\n")
    job = SlurmJob(
        recipe="x",
        run_dir=run_dir,
        overrides=(f"run.dir={run_dir}",),
        gpus_per_node=1,
        name="job",
        python=str(python),
        time=time,
        grace_period_s=1 if time == "10" else 50,
        **{"nodes": (2, 2), "ranks_per_node": 1, **fields},
    )
    script = folder / "job.sbatch"
    script.write_text(render(job))
    return RunningJob(
        cluster, script, run_dir, name="job", cwd=folder, patience_s=PATIENCE_S, env=env
    )


def format_failure(step: int, *samples: str) -> str:
    return json.dumps(
        {
            "status": "failed",
            "steps_done": step,
            "failed_step": step,
            "reason": "boom",
            "offending_samples": samples,
        }
    )


@needs_slurm
@pytest.mark.slow
def test_slurm_accepts_every_rendered_script(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for starter in STARTERS:
        job = SlurmJob(
            recipe="x",
            run_dir=Path("r"),
            nodes=(1, 2),
            gpus_per_node=8,
            ranks_per_node=8,
            starter=starter,
        )
        tried = subprocess.run(
            cluster.enter_head(["sbatch", "--test-only"]),
            input=render(job),
            env=cluster.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert tried.returncode == 0 and "to start at" in tried.stderr, tried.stderr


@needs_slurm
@pytest.mark.slow
def test_the_same_step_twice_halts_and_the_log_names_the_samples(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(
        cluster, tmp_path, format_failure(5, "image/a/1@0"), format_failure(5, "image/a/1@0")
    )
    job.wait_for_requeue(1)
    assert cluster.show_job(job.number)["JobState"] == "PENDING"  # it backs off
    job.start_soon()
    assert job.wait_for_end() == "FAILED"
    assert (
        "two starts failed at step 5" in job.read_log_tail()
        and "image/a/1@0" in job.read_log_tail()
    )
    assert [(a.restart_count, a.status, a.action, a.nodes) for a in job.read_attempts()] == [
        (0, "failed", "requeue", ("n1", "n2")),
        (1, "failed", "halt", ("n1", "n2")),
    ]


@needs_slurm
@pytest.mark.slow
@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_a_container_runs_the_same(cluster: Cluster, tmp_path: Path, starter: str) -> None:
    (tmp_path / "apptainer").write_text(APPTAINER)
    (tmp_path / "apptainer").chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{cluster.env['PATH']}"}
    done = json.dumps({"status": "done", "steps_done": 9, "reason": "9 steps"})
    job = submit(
        cluster,
        tmp_path,
        done,
        env=path,
        container="an image.sif",
        container_runtime="apptainer",
        starter=starter,
    )
    assert job.wait_for_end() == "COMPLETED"
    assert [a.status for a in job.read_attempts()] == ["done"]


@needs_slurm
@pytest.mark.slow
def test_a_job_of_several_ranks_a_node_comes_back_on_fewer_nodes(
    cluster: Cluster, tmp_path: Path
) -> None:
    last = json.dumps({"status": "done", "steps_done": 9, "reason": "9 steps"})
    job = submit(cluster, tmp_path, "wait", last, nodes=(1, 2), ranks_per_node=2)
    wait_for(tmp_path / "run" / "waits")
    cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        cluster.run("scancel", "--signal=USR1", "--batch", str(job.number))
        job.wait_for_requeue(1)
        (tmp_path / "run" / "stop").unlink()
        job.start_soon()
        assert job.wait_for_end() == "COMPLETED"
    finally:
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert [(a.status, a.nodes) for a in job.read_attempts()] == [
        ("preempted", ("n1", "n2")),
        ("done", ("n1",)),
    ]


@needs_slurm
@pytest.mark.slow
def test_wrong_usage_ends_at_once(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(
        cluster,
        tmp_path,
        json.dumps({"status": "usage", "steps_done": None, "reason": "unknown key"}),
    )
    assert job.wait_for_end() == "FAILED"
    assert cluster.show_job(job.number)["ExitCode"] == "2:0" and job.count_restarts() == 0


@needs_slurm
@pytest.mark.slow
def test_usr1_to_the_script_stops_the_ranks_and_requeues_but_scancel_ends_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, "wait", "wait")
    wait_for(tmp_path / "run" / "waits")
    cluster.run("scancel", "--signal=USR1", "--batch", str(job.number))
    job.wait_for_requeue(1)
    assert (
        job.read_attempts()[0].status == "preempted" and job.read_attempts()[0].action == "requeue"
    )
    (tmp_path / "run" / "waits").unlink()
    (tmp_path / "run" / "stop").unlink()
    job.start_soon()
    wait_for(tmp_path / "run" / "waits")
    cluster.run("scancel", str(job.number))
    assert job.wait_for_end() == "CANCELLED"
    time.sleep(2)
    assert cluster.show_job(job.number)["JobState"] == "CANCELLED" and job.count_restarts() == 1


@needs_slurm
@pytest.mark.soak
def test_the_time_limit_is_announced_and_the_job_comes_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(
        cluster,
        tmp_path,
        "wait",
        json.dumps({"status": "done", "steps_done": 9, "reason": "9 steps"}),
        time="2",
    )
    job.wait_for_requeue(1)
    (tmp_path / "run" / "stop").unlink(missing_ok=True)
    job.start_soon()
    assert job.wait_for_end() == "COMPLETED"
    assert [a.status for a in job.read_attempts()] == ["preempted", "done"]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


WITH_SIGINT = ("env", "--default-signal=INT")
"""If a shell runs the tests in the background, its children ignore Ctrl-C otherwise."""

OWNER = '''
import sys, time
from pathlib import Path
from onellm_dist.testing.slurm_cluster.cluster import Cluster
JOB = """#!/bin/bash
#SBATCH --nodes=2 --output=/dev/null
srun --nodes=2 bash -c 'touch /dev/shm/MARK; setsid sleep 600 & sleep 600'
"""
with Cluster(2, ssh=True) as cluster:
    script = cluster.root / "job.sh"
    script.write_text(JOB)
    cluster.submit(script)
    def sleeps(node):
        pids = cluster.list_pids(node)
        return any("sleep" in Path(f"/proc/{pid}/cmdline").read_text() for pid in pids)
    while not all(sleeps(node) for node in cluster.nodes):
        time.sleep(0.1)
    Path(sys.argv[1]).write_text(str(cluster.root))
    HOW
'''


@needs_slurm
@pytest.mark.slow
@pytest.mark.parametrize("how", ["failure", "interrupt", "term", "kill"])
def test_nothing_is_left(how: str, tmp_path: Path) -> None:
    """The owner of a cluster with a job fails, is interrupted, terminated or killed."""
    root_file = tmp_path / "root"
    mark = f"mark-{uuid.uuid4()}"
    last = "raise RuntimeError('a fault')" if how == "failure" else "time.sleep(600)"
    # The settings of another Slurm must not be taken for ours.
    env = {
        **os.environ,
        "SLURM_CONF": "/no/such/slurm.conf",
        "SLURM_JOB_ID": "1",
        "SBATCH_PARTITION": "theirs",
    }
    code = OWNER.replace("MARK", mark).replace("HOW", last)
    owner = subprocess.Popen(
        [*WITH_SIGINT, sys.executable, "-c", code, str(root_file)],
        env=env,
        stderr=subprocess.DEVNULL,
    )
    wait_for(root_file)
    root = root_file.read_text()
    if how != "failure":
        # Python drops an interrupt that falls into a finaliser: wait until the owner sleeps.
        time.sleep(0.5)
        root = root_file.read_text()
        assert list_processes(root)
        owner.send_signal(
            {"interrupt": signal.SIGINT, "term": signal.SIGTERM, "kill": signal.SIGKILL}[how]
        )
    assert owner.wait(timeout=PATIENCE_S) != 0
    deadline = time.monotonic() + 20
    while (left := list_processes(root)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert root not in Path("/proc/mounts").read_text()
    assert not Path("/dev/shm", mark).exists()
    if how == "kill":  # only its folder stays, until the next cluster
        with Cluster(1):
            pass
    assert not Path(root).exists()


def list_processes(root: str) -> list[int]:
    """Processes whose environment or command line names the cluster's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if root.encode() in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_without_root_or_packages_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
    monkeypatch.setattr(requirements, "_PATH", str(tmp_path))
    with pytest.raises(OneLLMError, match="slurm-wlm") as error:
        requirements.check_requirements()
    assert "make slurm" in error.value.do
    for tool in requirements.PACKAGES:
        (tmp_path / tool).write_text("")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(OneLLMError, match="root is needed"), Cluster(1):
        pass
    assert set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")) <= before
