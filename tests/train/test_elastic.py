"""torchrun elastic (`--nnodes 1:2`) with both nodes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lost_node import AWAITED_AT, STEP_VARIABLE
from small_onellm import get_small_keys
from toy_runs import Runs

from onellm_dist.launch.local import find_free_port
from onellm_dist.train.records.json_lines import read_lines

pytestmark = pytest.mark.slow
STEPS, LOST_AT, EVERY = 8, 5, 2
PATIENCE_S = 240


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of two ranks that nothing happened to."""
    made = Runs(
        tmp_path_factory.mktemp("elastic"),
        ("image", "imu"),
        16,
        train__steps=STEPS,
        data__global_batch=4,
        checkpoint__every=EVERY,
        checkpoint__keep=20,
        **get_small_keys(),
    )
    made.run("undisturbed", 2)
    return made


class Agents:
    """The torchrun of each node, of one rank each."""

    def __init__(self, runs: Runs, name: str, nodes: str) -> None:
        conf = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"
        self._command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={nodes}",
            "--nproc-per-node=1",
            "--max-restarts=3",
            "--monitor-interval=0.2",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{find_free_port()}",
            f"--rdzv-id={name}",
        ]
        self._conf = conf
        self._training = ["--module", "onellm_dist.train", runs.recipe, *runs.overrides(name)]
        self.running: list[subprocess.Popen[str]] = []

    def start(self, **env: str) -> None:
        """Start the agent of one more node; the first one holds the store at which they meet."""
        conf = f"--rdzv-conf=is_host={int(not self.running)},{self._conf}"
        self.running.append(
            subprocess.Popen(
                [*self._command, conf, *self._training],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "DS_ACCELERATOR": "cpu",
                    "CUDA_VISIBLE_DEVICES": "",
                    **env,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    def end(self) -> list[int]:
        """Wait for all of them; returns their exit codes."""
        try:
            self.output = "\n".join(a.communicate(timeout=PATIENCE_S)[0] for a in self.running)
        finally:
            for agent in self.running:
                if agent.poll() is None:
                    agent.kill()
        return [agent.returncode for agent in self.running]


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until a step is done."""
    deadline = time.monotonic() + PATIENCE_S
    while step not in {line["step"] for line in read_lines(folder / "metrics.jsonl")}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "events.jsonl") if line["event"] == "start"]


def check_samples(runs: Runs, name: str) -> None:
    """Every step once, with the samples and the loss of the undisturbed run."""
    there, here = runs.metrics("undisturbed"), runs.metrics(name)
    assert sorted(here) == sorted(there) == list(range(STEPS))
    for step, line in here.items():
        assert line["sample_digest"] == there[step]["sample_digest"], step
        assert line["loss"] == pytest.approx(there[step]["loss"], rel=1e-5), step


def test_a_lost_node_leaves_the_other_one_to_go_on_with_the_same_samples(runs: Runs) -> None:
    runs.keys["train__callbacks"] = "[lost_node:LostNode]"
    agents = Agents(runs, "elastic", "1:2")
    agents.start()
    agents.start(**{STEP_VARIABLE: str(LOST_AT)})
    codes = agents.end()
    assert codes == [0, -9], agents.output
    resumed = LOST_AT // EVERY * EVERY
    starts = read_starts(runs.root / "elastic")
    assert [(s["world_size"], s["first_step"]) for s in starts] == [(2, 0), (1, resumed)]
    check_samples(runs, "elastic")


@pytest.mark.soak
def test_a_node_that_joins_takes_part_and_no_step_is_lost(runs: Runs) -> None:
    """torchrun asks the ranks to stop: they write a checkpoint, and start again with one more."""
    runs.keys["train__callbacks"] = "[lost_node:AwaitNode]"
    agents = Agents(runs, "joined", "1:2")
    agents.start()
    wait_for_step(runs.root / "joined", AWAITED_AT - 1)
    agents.start()
    codes = agents.end()
    assert codes == [0, 0], agents.output
    starts = read_starts(runs.root / "joined")
    assert [(s["world_size"], s["first_step"]) for s in starts] == [(1, 0), (2, AWAITED_AT + 1)]
    assert starts[1]["lost_steps"] == 0
    check_samples(runs, "joined")
