"""The script of each node of a job on Kubernetes or SkyPilot, run here with torchrun replaced.

The decision after the ranks' end is made by the real module.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from onellm_dist.common.run_files import REFUSALS
from onellm_dist.launch.cloud.job import CloudJob, CloudVolume, make_cloud_job
from onellm_dist.launch.cloud.node_script import NO_DECISION
from onellm_dist.launch.cloud.skypilot import render_task
from onellm_dist.launch.local import find_free_port
from onellm_dist.launch.slurm.attempts import read_attempts
from onellm_dist.shards.sources.toyworld.build import build_toyworld
from onellm_dist.train.records.json_lines import read_lines

PATIENCE_S = 60.0
TORCHRUN = """#!/bin/bash
# python: the ranks of node $NODE do what $RUN/plan.$NODE says; the rest is the real interpreter.
case " $* " in
*" torch.distributed.run "*) . "$RUN/plan.$NODE" ;;
*) exec {python} "$@" ;;
esac
"""
UNTIL_STOPPED = """
trap 'exit 143' TERM
touch "$RUN/up.$NODE"
until [ -e "$RUN/stop" ]; do sleep 0.05; done
echo '{"status": "preempted", "steps_done": 3}' >"$RUN/exit.json"
exit 1
"""
UNTIL_ENDED = """
trap 'touch "$RUN/ended_by_script.$NODE"; kill "$asleep"; exit 143' TERM
touch "$RUN/up.$NODE"
sleep 600 & asleep=$!
wait
"""


def end_with(status: str = "", code: int = 1, **fields: Any) -> str:
    """A plan: ranks that write `exit.json`, and a torchrun that exits with `code`."""
    if not status:
        return f"exit {code}\n"
    return f"echo '{json.dumps({'status': status, **fields})}' >\"$RUN/exit.json\"\nexit {code}\n"


class Nodes:
    """A job of two nodes on this machine, each a script in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        python = folder / "python"
        python.write_text(TORCHRUN.format(python=sys.executable))
        python.chmod(0o755)
        self.job = CloudJob(
            recipe="x",
            recipe_text="",
            run_dir=str(self.run_dir),
            nodes=2,
            gpus_per_node=0,
            ranks_per_node=2,
            container="image",
            name="x",
            volumes=(CloudVolume("v", str(folder)),),
            python=str(python),
            grace_period_s=3,
        )
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *plans: str, patience_s: int = 20, **fields: Any) -> None:
        """Start a script for each plan; the first is that of node 0."""
        text = yaml.safe_load(render_task(dataclasses.replace(self.job, **fields)))["run"]
        text = text.replace("i < 903;", f"i < {patience_s * 5};")
        text = text.replace("sleep 1 & wait $!", "sleep 0.2 & wait $!")
        self.running = []
        for node, plan in enumerate(plans):
            (self.run_dir / f"plan.{node}").write_text(plan)
            env = {
                **os.environ,
                "RUN": str(self.run_dir),
                "NODE": str(node),
                "SKYPILOT_NODE_RANK": str(node),
                "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
                "SKYPILOT_TASK_ID": "sky-managed-7",
            }
            process = subprocess.Popen(
                ["bash", "-c", text],
                env=env,
                start_new_session=True,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self.running.append(process)

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: all((self.run_dir / name).exists() for name in names))

    def end(self) -> list[int]:
        """Wait for all scripts; returns their exit codes."""
        self.output = [process.communicate(timeout=PATIENCE_S)[0] for process in self.running]
        return [process.returncode for process in self.running]

    def kill(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(is_met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes."""
    made = Nodes(tmp_path)
    yield made
    made.kill()


@pytest.mark.slow
def test_an_evicted_node_stops_all_and_the_job_starts_again(nodes: Nodes) -> None:
    """A TERM to the second node alone: both write a checkpoint, and no back-off is waited for."""
    nodes.start(UNTIL_STOPPED, UNTIL_STOPPED)
    nodes.wait_for("up.0", "up.1")
    nodes.running[1].send_signal(signal.SIGTERM)
    assert nodes.end() == [EXIT_PREEMPTED, EXIT_PREEMPTED], nodes.output
    assert "asked to stop" in nodes.output[1]
    (attempt,) = read_attempts(nodes.run_dir)
    assert (attempt.status, attempt.action, attempt.steps_done) == ("preempted", "requeue", 3)
    assert (attempt.job_id, attempt.nodes) == ("sky-managed-7", ("10.0.0.1", "10.0.0.2"))
    assert attempt.ranks == 4
    (nodes.run_dir / "stop").unlink()
    nodes.start(end_with("done", 0, steps_done=9), end_with(code=0))
    assert nodes.end() == [EXIT_DONE, EXIT_DONE]
    assert [a.restart_count for a in read_attempts(nodes.run_dir)] == [0, 1]


@pytest.mark.slow
def test_what_one_node_failed_by_ends_both_and_a_crash_loop_halts(nodes: Nodes) -> None:
    """The ranks of the first node would wait for ever; node 1 has written why it failed."""
    failure = end_with("failed", failed_step=5, steps_done=5, reason="no memory", rank=2)
    meet = 'until [ -e "$RUN/up.0" ]; do sleep 0.05; done\n'
    nodes.start(UNTIL_ENDED, meet + failure, max_requeues=5)
    nodes.wait_for("ended_by_script.0")
    wait_until(lambda: read_attempts(nodes.run_dir)[-1].action == "requeue")
    for process in nodes.running:  # the back-off is a minute: a stop cuts it short
        process.send_signal(signal.SIGTERM)
    assert nodes.end() == [EXIT_PREEMPTED, EXIT_PREEMPTED], nodes.output
    nodes.start(failure, end_with(code=1))
    assert nodes.end() == [EXIT_FAILED, EXIT_FAILED], nodes.output
    assert "two starts failed at step 5" in nodes.output[0]
    assert [a.action for a in read_attempts(nodes.run_dir)] == ["requeue", "halt"]


@pytest.mark.slow
def test_a_refused_recipe_halts_and_an_old_word_of_the_first_node_is_not_believed(
    nodes: Nodes,
) -> None:
    """A refusal is found by its meeting point: ranks do not know the job that they are of."""
    (nodes.run_dir / "nodes").mkdir()
    (nodes.run_dir / "nodes" / "exit_code").write_text("75\n")
    time.sleep(0.05)
    old = {"time": "2020-01-01T00:00:00+0000", "status": "usage", "reason": "an old one"}
    (nodes.run_dir / REFUSALS).write_text(json.dumps({**old, "start": "10.0.0.1:29500"}) + "\n")
    refuse = (
        f'{sys.executable} -c "from pathlib import Path; import sys, time\n'
        "from onellm_dist.common.refusals import append_refusal\n"
        "append_refusal(Path(sys.argv[1]), status='usage', exit_code=2, reason='no such key',"
        'rank=0, start=\'10.0.0.1:29500\', since=time.time() - 1)" "$RUN"\nexit 1\n'
    )
    meet = 'until grep -q "no such key" "$RUN/refusals.jsonl"; do sleep 0.05; done\n'
    nodes.start(refuse, meet + end_with(code=1))
    assert nodes.end() == [EXIT_USAGE, EXIT_USAGE], nodes.output
    assert "no such key" in nodes.output[0]


@pytest.mark.slow
def test_without_the_first_node_the_others_end_by_themselves(nodes: Nodes) -> None:
    nodes.start(UNTIL_ENDED, end_with(code=1), patience_s=1)
    nodes.wait_for("up.0")
    os.killpg(nodes.running[0].pid, signal.SIGKILL)  # its machine is gone
    assert nodes.end()[1] == NO_DECISION
    nodes.start(end_with("done", 0, steps_done=9), end_with(code=0))
    assert nodes.end() == [EXIT_DONE, EXIT_DONE]
    assert [a.status for a in read_attempts(nodes.run_dir)] == ["lost", "done"]


def make_real_job(folder: Path) -> CloudJob:
    """30 steps of one rank on each of two nodes, which share the folder."""
    return make_cloud_job(
        Path("toy/align_image"),
        [
            f"run.dir={folder / 'run'}",
            f"data.root={folder / 'toy'}",
            "train.steps=30",
            "data.mixture=[{path: imu, weight: 1}]",
            "data.global_batch=4",
            "data.workers=0",
        ],
        target="skypilot",
        nodes="2",
        volumes=[f"shared:{folder}"],
        container="x",
        gpus_per_node=0,
        ranks_per_node=1,
        python=sys.executable,
        grace_period_s=60,
    )


@pytest.mark.soak
def test_two_nodes_with_real_ranks_are_evicted_and_end(tmp_path: Path) -> None:
    """The whole chain, nothing replaced: script, torchrun, ranks, checkpoint, decision, resume."""
    build_toyworld(
        tmp_path / "toy", seed=0, train_per_modality=16, test_per_modality=2, modalities=("imu",)
    )
    run_dir = tmp_path / "run"
    job = make_real_job(tmp_path)
    text = yaml.safe_load(render_task(job))["run"].replace("=29500", f"={find_free_port()}")

    def start() -> list[subprocess.Popen[str]]:
        return [
            subprocess.Popen(
                ["bash", "-c", text],
                env={
                    **os.environ,
                    "DS_ACCELERATOR": "cpu",
                    "CUDA_VISIBLE_DEVICES": "",
                    "SKYPILOT_NODE_RANK": str(node),
                    "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
                    "SKYPILOT_TASK_ID": "sky-managed-8",
                },
                start_new_session=True,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for node in (0, 1)
        ]

    def end(scripts: list[subprocess.Popen[str]], code: int) -> None:
        output = [script.communicate(timeout=300)[0] for script in scripts]
        assert [script.returncode for script in scripts] == [code, code], "\n".join(output)

    scripts = start()
    deadline = time.monotonic() + 300
    while len(read_lines(run_dir / "metrics.jsonl")) < 2:
        assert time.monotonic() < deadline and scripts[0].poll() is None
        time.sleep(0.05)
    scripts[1].send_signal(signal.SIGTERM)
    end(scripts, EXIT_PREEMPTED)
    end(start(), EXIT_DONE)
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl")] == list(range(30))
    first, second = read_attempts(run_dir)
    assert (first.status, first.action, second.status) == ("preempted", "requeue", "done")
    assert first.checkpoint == first.steps_done and second.restart_count == 1
