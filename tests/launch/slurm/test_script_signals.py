"""The job script while it waits: it reacts to a stop at any time and leaves nothing of a start.

Slurm's and pdsh's commands are replaced by small scripts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.launch.slurm.attempts import read_attempts
from onellm_dist.launch.slurm.job import STARTERS, SlurmJob, Starter
from onellm_dist.launch.slurm.script import render

PATIENCE_S = 60.0
TOOLS = {
    "python": f'exec {sys.executable} "$@"',
    "scontrol": '[ "$1" != show ] || echo n1',
    "squeue": "echo COMPLETING",  # somebody else requeues
    # The ranks run in a session of their own, as under ssh: only the stop file reaches them.
    "deepspeed": """
setsid ranks "$RUN" & echo $! >"$RUN/ranks.pid"
touch "$RUN/started"
exec sleep "$RUNNER_S"
""",
    "ranks": """
trap "touch $1/killed; exit 1" TERM
for ((i = 0; i < 300; i++)); do
    if [ -e "$1/stop" ]; then
        sleep 0.5
        echo '{"status": "preempted", "steps_done": 3}' >"$1/exit.json"
        exit
    fi
    sleep 0.1
done
""",
    "pdsh": """
case "$*" in
*pkill*) kill $(cat "$RUN/ranks.pid") ;;
*pgrep*) kill -0 $(cat "$RUN/ranks.pid") && echo "n1: 1" ;;
*true*)
    echo x >>"$RUN/asked"
    [ "$(wc -l <"$RUN/asked")" -gt "$DEAF" ] || { touch "$RUN/started"; exit 255; } ;;
esac
""",
    "srun": """
case "$*" in
*doctor*)
    touch "$RUN/started"
    [ -z "$BAD" ] || echo "$BAD" >"$RUN/bad_nodes.7.0"
    exec sleep 50 ;;
*) touch "$RUN/trained" ;;
esac
""",
}


class Script:
    """A job script that runs here, in a process group of its own."""

    def __init__(
        self, folder: Path, *, runner_s: float = 50, bad: str = "", deaf: int = 0, **fields: Any
    ) -> None:
        tools = folder / "tools"
        self.run_dir = folder / "run"
        tools.mkdir()
        self.run_dir.mkdir()
        for name, body in TOOLS.items():
            (tools / name).write_text(f"#!/bin/bash\n{body}\n")
            (tools / name).chmod(0o755)
        job = SlurmJob(
            recipe="x",
            run_dir=self.run_dir,
            nodes=(1, 1),
            gpus_per_node=0,
            ranks_per_node=2,
            **fields,
        )
        text = (
            render(job)
            .replace("patience=30", "patience=1")
            .replace("i < 20", "i < 3")
            .replace("sleep 2\n", "sleep 0.1\n")
        )
        env = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "RUN": str(self.run_dir),
            "RUNNER_S": str(runner_s),
            "DEAF": str(deaf),
            "BAD": bad,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n1",
        }
        self.process = subprocess.Popen(
            ["bash", "-c", text],
            env=env,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + PATIENCE_S
        while not (self.run_dir / "started").exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)

    def end(self, number: int | None = None) -> str:
        """Signal the whole group, as `scontrol requeue` does; returns the script's output."""
        if number is not None:
            os.killpg(self.process.pid, number)
        try:
            return self.process.communicate(timeout=PATIENCE_S)[0]
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def ended(self) -> tuple[str, str]:
        """Status of the attempt, and the action that follows it."""
        last = read_attempts(self.run_dir)[-1]
        return last.status, last.action


def test_a_term_to_script_and_runner_alike_reaches_ranks_under_ssh(tmp_path: Path) -> None:
    script = Script(tmp_path, starter="deepspeed")
    output = script.end(signal.SIGTERM)
    assert script.ended() == ("preempted", "requeue"), output
    assert json.loads((script.run_dir / "exit.json").read_text())["steps_done"] == 3, (
        "the ranks had the time to record their end"
    )
    assert not (script.run_dir / "killed").exists() and "asked to stop" in output


def test_ranks_that_a_runner_leaves_are_ended(tmp_path: Path) -> None:
    script = Script(tmp_path, starter="deepspeed", runner_s=0)
    output = script.end()
    assert "ranks were left" in output and (script.run_dir / "killed").exists()
    assert script.ended() == ("failed", "requeue")


def test_a_node_that_does_not_accept_ssh_yet_is_waited_for(tmp_path: Path) -> None:
    script = Script(tmp_path, starter="deepspeed", runner_s=0, deaf=2)
    script.end()
    assert (script.run_dir / "ranks.pid").exists() and len(
        (script.run_dir / "asked").read_text().split()
    ) == 3


def test_no_ranks_are_started_if_a_node_refuses_ssh(tmp_path: Path) -> None:
    script = Script(tmp_path, starter="deepspeed", deaf=99)
    output = script.end()
    assert "no ssh to every node of n1" in output and not (script.run_dir / "ranks.pid").exists()
    assert script.ended() == ("failed", "requeue")


def test_a_stop_in_the_preflight_ends_it_and_starts_no_ranks(tmp_path: Path) -> None:
    script = Script(tmp_path, preflight=True)
    os.kill(script.process.pid, signal.SIGUSR1)
    script.end()
    assert script.ended() == ("preempted", "requeue") and not (script.run_dir / "trained").exists()


def test_a_stuck_node_does_not_hold_up_the_result(tmp_path: Path) -> None:
    script = Script(tmp_path, preflight=True, bad="n1")
    script.end()
    assert script.ended() == ("failed", "requeue") and not (script.run_dir / "trained").exists()
    assert "bad nodes n1" in read_attempts(script.run_dir)[-1].reason


@pytest.mark.parametrize("starter", STARTERS)
def test_every_wait_of_the_script_is_bounded_or_can_be_interrupted(starter: Starter) -> None:
    """Bash runs traps only after a command in the foreground, so long commands run behind it."""
    text = render(SlurmJob("x", Path("r"), (2, 2), 8, 8, starter=starter, preflight=True))
    steps = text.replace("\\\n", "").splitlines()
    launches = [
        line for line in steps if "onellm_dist.train" in line or "doctor --distributed" in line
    ]
    assert len(launches) == 2 and all(line.endswith("&") for line in launches)
    inside = render(SlurmJob("x", Path("r"), (2, 2), 8, 8, container="x.sqsh"))
    assert "timeout 600 srun --nodes=1 --ntasks=1 --overlap" in inside
