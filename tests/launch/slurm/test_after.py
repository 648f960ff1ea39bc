"""What follows a start of a job: a requeue with a delay, or a halt, and the reason given."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.common.run_files import ATTEMPTS
from onellm_dist.launch.slurm.after import get_grace_period_warning, main, record_begin, record_end
from onellm_dist.launch.slurm.attempts import get_local_time, read_attempts
from onellm_dist.launch.slurm.next_action import NextAction


class History:
    """Starts of one job, one after the other, in a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.restart = 0

    def env(self) -> dict[str, str]:
        return {
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(self.restart),
            "SLURM_JOB_NODELIST": "n[1-2]",
        }

    def begin(self) -> None:
        record_begin(self.run_dir, self.env())

    def end(
        self, *, status: int = 1, stop: float = 0.0, most: int = 3, checkpoint: int | None = None
    ) -> tuple[str, int, int]:
        if checkpoint is not None:
            (self.run_dir / "checkpoints" / f"step-{checkpoint:08d}").mkdir(parents=True)
        action = record_end(
            self.run_dir, self.env(), launcher_status=status, stop_asked=stop, max_requeues=most
        )
        self.restart += 1
        self.message = action.message
        return action.action, action.delay_s, action.exit_code

    def start(self, exit_json: dict[str, Any] | None = None, **how: Any) -> tuple[str, int, int]:
        self.begin()
        if exit_json is not None:
            (self.run_dir / "exit.json").write_text(json.dumps(exit_json))
        return self.end(**how)


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "run")


def test_done_and_usage_end_the_job(history: History) -> None:
    # The launcher's own exit code is not asked.
    assert history.start({"status": "done", "steps_done": 12, "reason": "12 steps"}, status=1) == (
        "done",
        0,
        0,
    )
    history.begin()
    assert not (history.run_dir / "exit.json").exists()  # otherwise an older end would count
    assert history.end(status=2) == ("requeue", 60, 1)  # no rank has said that its usage was wrong
    assert "the launcher's exit code is 2" in history.message
    assert history.start({"status": "usage", "steps_done": None, "reason": "unknown key"}) == (
        "halt",
        0,
        2,
    )
    assert "unknown key" in history.message


def failed(
    history: History, step: int, samples: tuple[str, ...] = (), **how: Any
) -> tuple[str, int, int]:
    found = {
        "status": "failed",
        "steps_done": step,
        "failed_step": step,
        "reason": f"boom at {step}",
        "offending_samples": samples,
    }
    return history.start(found, **how)


def preempted(history: History, step: int, **how: Any) -> tuple[str, int, int]:
    return history.start({"status": "preempted", "steps_done": step, "reason": "stop file"}, **how)


def test_preemptions_are_requeued_at_once_and_never_counted(history: History) -> None:
    for step in range(1, 9):
        assert preempted(history, step, most=0) == ("requeue", 15, 75)


def test_failures_back_off_and_end_after_the_limit(history: History) -> None:
    assert failed(history, 10) == ("requeue", 60, 1)
    assert failed(history, 11) == ("requeue", 120, 1)
    assert failed(history, 12) == ("requeue", 240, 1)
    assert failed(history, 13) == ("halt", 0, 1)
    assert "4 failures in a row" in history.message and "boom at 13" in history.message


def test_a_new_checkpoint_or_a_preemption_ends_the_row(history: History) -> None:
    assert failed(history, 10) == ("requeue", 60, 1)
    assert failed(history, 11) == ("requeue", 120, 1)
    assert failed(history, 50, checkpoint=40) == ("requeue", 60, 1)
    assert failed(history, 51) == ("requeue", 120, 1)
    assert preempted(history, 45) == ("requeue", 15, 75)
    assert failed(history, 52) == ("requeue", 60, 1)


def test_the_same_step_twice_halts_and_names_the_offending_samples(history: History) -> None:
    assert failed(history, 10, samples=("image/a/1@0", "image/a/2@0"))[0] == "requeue"
    assert preempted(history, 9)[0] == "requeue"
    assert failed(history, 10, samples=("image/a/2@0", "image/a/3@0")) == ("halt", 0, 1)
    assert (
        "two starts failed at step 10" in history.message
        and "image/a/2@0" in history.message
        and "image/a/1@0" not in history.message
    )


def test_an_out_of_memory_that_lowered_the_budgets_is_requeued_and_not_counted(
    history: History,
) -> None:
    """It comes at the same step each time, with other budgets: that is not a crash loop."""
    found = {
        "status": "failed",
        "steps_done": 10,
        "failed_step": 10,
        "reason": "step 10: rank 1 ran out of memory: the token budgets fall",
        "offending_samples": [],
        "budget_lowered": True,
    }
    for _ in range(6):
        assert history.start(found, most=1) == ("requeue", 15, 1)
        assert "the token budgets fall" in history.message
    assert all(attempt.budget_lowered for attempt in read_attempts(history.run_dir))
    assert failed(history, 10, most=1) == ("requeue", 60, 1)  # the first failure of its kind
    assert failed(history, 10, most=3) == ("halt", 0, 1)
    assert "two starts failed at step 10" in history.message


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("follow_links: true", True),
        ("follow_links: false", False),
        ("global_batch: 8", False),
        (None, False),
    ],
)
def test_the_commands_follow_links_if_the_run_does(
    history: History, recipe: str | None, expected: bool
) -> None:
    history.begin()
    if recipe is not None:
        text = f"data:\n  root: /data\n  {recipe}\ntrain:\n  steps: 3\n"
        (history.run_dir / "config.yaml").write_text(text)
    for _ in range(2):
        failed(history, 10, samples=("image/a/1@0",))
    assert ("onellm shards preview image --key 1 --follow-links" in history.message) == expected
    assert "onellm shards preview image --key 1" in history.message


def test_the_same_step_after_progress_beyond_it_is_not_a_crash_loop(history: History) -> None:
    assert failed(history, 10)[0] == "requeue"
    assert preempted(history, 20)[0] == "requeue"
    assert failed(history, 10)[0] == "requeue"


def test_failures_before_the_first_step_are_only_limited_in_number(history: History) -> None:
    assert history.start(status=1) == ("requeue", 60, 1)
    assert history.start({"status": "failed", "steps_done": None, "reason": "no route to n2"}) == (
        "requeue",
        120,
        1,
    )
    assert history.start(status=1) == ("requeue", 240, 1)
    assert history.start(status=1) == ("halt", 0, 1)
    assert (
        "4 failures in a row" in history.message
        and "before the first step" in history.message
        and "without exit.json" in history.message
    )


def trained(history: History, first_step: int, last: int, **event: Any) -> None:
    """The ranks of this start reached training and did the steps up to `last`."""
    start = {"event": "start", "first_step": first_step, "time": get_local_time(), **event}
    with (history.run_dir / "events.jsonl").open("a") as out:
        out.write(json.dumps(start) + "\n")
    lines = "".join(f'{{"step": {step}}}\n' for step in range(first_step, last + 1))
    (history.run_dir / "metrics.jsonl").write_text(lines + '{"step": 99, "lo')


@pytest.mark.parametrize(
    "event", [{"slurm_job_id": "7", "slurm_restart_count": 0}, {}], ids=["srun", "ssh"]
)
def test_ranks_that_vanish_are_placed_by_their_metrics(
    history: History, event: dict[str, Any]
) -> None:
    history.begin()
    trained(history, 3, 4, **event)
    assert history.end(status=137)[0] == "requeue"
    assert read_attempts(history.run_dir)[-1].failed_step == 5


def test_starts_that_never_reached_training_ignore_the_metrics_of_earlier_ones(
    history: History,
) -> None:
    history.begin()
    trained(history, 100, 104, slurm_job_id="7", slurm_restart_count=0)
    assert history.end(status=137, checkpoint=100)[0] == "requeue"
    assert history.start(status=1) == ("requeue", 120, 1) and history.start(status=1) == (
        "requeue",
        240,
        1,
    )
    assert [(a.steps_done, a.failed_step) for a in read_attempts(history.run_dir)] == [
        (105, 105),
        (None, None),
        (None, None),
    ]


def test_two_failures_between_the_same_steps_halt_but_not_right_after_a_resume(
    history: History,
) -> None:
    resumed = {
        "status": "failed",
        "steps_done": 40,
        "failed_step": None,
        "reason": "connection reset",
    }
    for _ in range(2):
        assert history.start(resumed, checkpoint=None if history.restart else 40)[0] == "requeue"
    validating = {**resumed, "steps_done": 45}
    assert (
        history.start(validating)[0] == "requeue" and history.start(validating, most=9)[0] == "halt"
    )


def test_a_stop_without_time_for_a_checkpoint_is_not_a_failure(history: History) -> None:
    assert history.start(status=143, stop=1.0, most=0) == ("requeue", 15, 75)
    found = {"status": "failed", "steps_done": 4, "reason": "SIGTERM after the file: ended at once"}
    assert history.start(found, status=143, stop=1.0, most=0) == ("requeue", 15, 75)
    assert "before its checkpoint was complete" in history.message
    found["reason"] = (
        "connection closed by peer"  # and then Slurm ended the job, for a node was lost
    )
    assert history.start(found, status=143, stop=time.time() + 60) == ("requeue", 60, 1)


def test_a_start_that_never_ended_is_lost_and_counts_as_a_failure(history: History) -> None:
    history.begin()
    assert [a.status for a in read_attempts(history.run_dir)] == ["running"]
    history.restart += 1
    assert failed(history, 4) == ("requeue", 120, 1)
    first, second = read_attempts(history.run_dir)
    assert (first.status, first.end, second.status, second.steps_done) == (
        "lost",
        None,
        "failed",
        4,
    )
    assert first.nodes == ("n1", "n2") and (
        second.job_id,
        second.restart_count,
        second.action,
    ) == ("7", 1, "requeue")


def refuse(
    history: History, bad_nodes: str | None, status: int = 1, stop: float = 0.0
) -> NextAction:
    """A start whose preflight ended with `status` and wrote `bad_nodes` as its result."""
    history.begin()
    if bad_nodes is not None:
        (history.run_dir / f"bad_nodes.7.{history.restart}").write_text(bad_nodes)
    action = record_end(
        history.run_dir,
        history.env(),
        launcher_status=1,
        stop_asked=stop,
        max_requeues=3,
        preflight_status=status,
    )
    history.restart += 1
    return action


def test_a_preflight_that_names_bad_nodes_is_requeued_and_one_that_names_none_halts(
    history: History,
) -> None:
    for _ in range(2):  # never a crash loop: the next start has other nodes
        action = refuse(history, "n2\n", 137)
        assert action.action == "requeue" and "bad nodes n2" in action.message
    action = refuse(history, "")
    assert (action.action, action.exit_code) == ("halt", 1)


def test_a_preflight_without_a_result_is_a_failed_start_and_a_stopped_one_a_preemption(
    history: History,
) -> None:
    for _ in range(5):
        action = refuse(history, None, 143, stop=1.0)
        assert (action.action, action.delay_s, action.exit_code) == ("requeue", 15, 75)
    for delay in (60, 120, 240):  # srun could not launch, or the scheduler ended it
        action = refuse(history, None)
        assert (action.action, action.delay_s) == ("requeue", delay)
        assert "without a result" in action.message
    assert refuse(history, None, 124).action == "halt"


def test_a_grace_period_too_short_for_the_last_checkpoint_gives_a_warning(history: History) -> None:
    history.run_dir.mkdir()
    assert get_grace_period_warning(history.run_dir, 1) == ""
    lines = [
        {"event": "checkpoint", "seconds": 9.0},
        {"event": "checkpoint", "seconds": 40.0},
        {"event": "end"},
    ]
    (history.run_dir / "events.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    assert get_grace_period_warning(history.run_dir, 80) == ""
    assert "took 40 s" in get_grace_period_warning(
        history.run_dir, 79
    ) and "--grace-period 160" in get_grace_period_warning(history.run_dir, 79)


def test_the_ranks_of_a_start_are_recorded(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in history.env().items():
        monkeypatch.setenv(key, value)
    assert main(["begin", str(history.run_dir), "--ranks-per-node", "8"]) == 0
    assert read_attempts(history.run_dir)[-1].ranks == 16


def test_an_incomplete_line_is_ignored(history: History) -> None:
    preempted(history, 3)
    with (history.run_dir / ATTEMPTS).open("a") as out:
        out.write('{"job_id": "7", "resta')
    assert [a.status for a in read_attempts(history.run_dir)] == ["preempted"]


def test_the_command_line_needs_no_torch(history: History) -> None:
    history.begin()
    (history.run_dir / "exit.json").write_text(
        json.dumps({"status": "preempted", "steps_done": 3, "reason": "USR1"})
    )
    code = (
        "import sys; from onellm_dist.launch.slurm.after import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'deepspeed'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    line = ["end", str(history.run_dir), "--launcher-status", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *line],
        env=history.env(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "requeue 15 75\n"), done.stderr
    assert "preempted (USR1)" in done.stderr
