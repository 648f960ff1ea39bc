"""Evaluations as Slurm jobs: the script, what it does after each start, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onellm_dist.cli import app
from onellm_dist.common.errors import UsageError
from onellm_dist.common.refusals import append_refusal
from onellm_dist.common.run_files import STOP
from onellm_dist.evaluation.after_start import End, count_missing, record_begin, record_end
from onellm_dist.evaluation.answer_folder import AnswerWriter, WrittenAnswer, write_task
from onellm_dist.evaluation.questions import BenchmarkQuestion
from onellm_dist.launch.slurm.attempts import read_attempts
from onellm_dist.launch.slurm.job import STARTERS, SlurmJob, Starter
from onellm_dist.launch.slurm.script import render
from onellm_dist.launch.slurm.submit import make_evaluation_job

TASKS = ("mme", "gqa")
QUESTIONS = [BenchmarkQuestion(f"q{i}", "Is it?", answers=("yes",)) for i in range(4)]
ARGUMENTS = ("mme", "gqa", "--data", "/a b", "--limit", "4")


def make(out: Path, starter: Starter = "srun", ranks: int = 2) -> SlurmJob:
    return make_evaluation_job(
        Path("runs/$x/model"),
        [*ARGUMENTS, "--out", str(out)],
        tasks=TASKS,
        data=Path("/a b"),
        out=out,
        nodes="1-2",
        gpus_per_node=0,
        ranks_per_node=ranks,
        starter=starter,
        python="python",
    )


@pytest.mark.parametrize("starter", STARTERS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_script_asks_and_never_speaks_of_a_run(starter: Starter, ranks: int) -> None:
    text = render(make(Path("out"), starter, ranks))
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    arguments = "'runs/$x/model' mme gqa --data '/a b' --limit 4 --out out"
    if starter == "deepspeed":
        arguments = "url:runs/%24x/model mme gqa --data url:/a%20b --limit 4 --out out"
    assert text.count(f"onellm_dist.cli.evaluate_rank {arguments}") == 1
    assert "launch.ranks" not in text and "checkpoint" not in text and "ecipe" not in text
    assert "after_start begin" in text
    assert "--tasks mme gqa)" in text[text.index("after_start end") :]
    # a rank that was killed takes no other one with it
    assert ("--kill-on-bad-exit=0" in text) == (starter == "srun")
    assert max(map(len, text.splitlines())) <= 140


def answer(out: Path, task: str, first: int, last: int) -> None:
    write_task(out / task, {"model": "m", "split": "test"}, QUESTIONS)
    with AnswerWriter(out / task) as writer:
        writer.write(WrittenAnswer(f"q{i}", "Is it?", "yes", 1, "eos") for i in range(first, last))


Ended = Callable[..., tuple[str, str, int]]


@pytest.fixture
def ended(tmp_path: Path) -> Ended:
    """Begin a start of job 7, do something, end it: status, action and exit code."""

    def start(restart: int, *, do: Callable[[], None] = lambda: None, **end: float) -> object:
        env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
        record_begin(tmp_path, env, ranks_per_node=2)
        do()
        how = End(int(end.get("status", 0)), end.get("stop", 0.0))
        action = record_end(tmp_path, env, TASKS, how, max_requeues=2)
        last = read_attempts(tmp_path)[-1]
        assert last.action == action.action
        return last.status, action.action, action.exit_code

    return start  # type: ignore[return-value]


def test_what_is_missing_is_requeued_until_it_is_there(ended: Ended, tmp_path: Path) -> None:
    assert ended(0) == ("failed", "requeue", 1)  # exit code 0 alone is not an evaluation
    assert count_missing(tmp_path, TASKS) == {"mme": None, "gqa": None}
    assert ended(1, do=lambda: answer(tmp_path, "mme", 0, 3), stop=1.0)[0] == "preempted"
    assert count_missing(tmp_path, TASKS) == {"mme": 1, "gqa": None}
    # two more failures than in a row are allowed, each with new answers
    assert ended(2, do=lambda: answer(tmp_path, "gqa", 0, 1), status=1)[1] == "requeue"
    assert ended(3, do=lambda: answer(tmp_path, "gqa", 1, 2), status=137)[1] == "requeue"
    assert ended(4, do=lambda: answer(tmp_path, "gqa", 2, 4), status=9)[1] == "requeue"
    assert ended(5, do=lambda: answer(tmp_path, "mme", 3, 4)) == ("done", "done", 0)
    assert not count_missing(tmp_path, TASKS)


def test_failures_without_a_new_answer_end_the_job(ended: Ended, tmp_path: Path) -> None:
    answer(tmp_path, "mme", 0, 2)
    assert [ended(restart, status=1)[1] for restart in range(3)] == ["requeue", "requeue", "halt"]
    assert "gqa: all" in read_attempts(tmp_path)[-1].reason


def test_wrong_usage_is_not_tried_again(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        append_refusal(
            tmp_path,
            status="usage",
            exit_code=2,
            reason="no dataset",
            rank=1,
            start="",
            since=0,
        )

    assert ended(0, do=refuse, status=2) == ("usage", "halt", 2)
    assert read_attempts(tmp_path)[-1].reason == "no dataset"
    # of ranks that evaluate-run started, which wrote no line here
    assert ended(1, status=2) == ("usage", "halt", 2)


def test_a_stop_file_of_a_user_is_no_failure(ended: Ended, tmp_path: Path) -> None:
    for restart in range(4):  # more than the failures that are allowed
        assert ended(restart, status=75) == ("preempted", "requeue", 75)
    # as torchrun passes it on
    assert ended(4, do=(tmp_path / STOP).touch, status=1) == ("preempted", "requeue", 75)
    assert not (tmp_path / STOP).exists()
    assert ended(5, status=1)[0] == "failed"


def test_a_start_that_was_lost_is_recorded_by_the_next(tmp_path: Path) -> None:
    for restart in ("0", "1"):
        (tmp_path / STOP).touch()
        record_begin(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restart})
        assert not (tmp_path / STOP).exists()
    assert [attempt.status for attempt in read_attempts(tmp_path)] == ["lost", "running"]


@pytest.mark.seconds
def test_the_script_runs_from_start_to_answers(tmp_path: Path) -> None:
    """With a command in place of srun that answers as two ranks would, half at its first start."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from test_evaluation_job import answer; from pathlib import Path;"
        "out = Path(sys.argv[2]); half = not (out / 'mme').exists();"
        "[answer(out, task, 0 if half else 2, 2 if half else 4) for task in ('mme', 'gqa')];"
        "sys.exit(half)"
    )
    srun = f'exec {sys.executable} -c "{code}" {Path(__file__).parent} {out}'
    for name, body in {
        "srun": srun,
        "python": f'exec {sys.executable} "$@"',
        "squeue": "echo RUNNING",
        "scontrol": f'echo "$1" >>{tmp_path}/asked',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    codes = []
    for restart in ("0", "1"):
        env = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": restart,
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n1",
        }
        done = subprocess.run(
            ["bash", "-c", render(make(out))],
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        codes.append(done.returncode)
    assert codes == [1, 0], done.stderr
    assert (tmp_path / "asked").read_text().split() == ["requeue", "update"]
    assert [a.status for a in read_attempts(out)] == ["failed", "done"]


@pytest.mark.seconds
def test_the_command_renders_a_job_and_refuses_what_evaluate_would() -> None:
    def launch(*arguments: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, ["launch", *arguments])
        if isinstance(found.exception, UsageError):
            return found.exception.exit_code, str(found.exception)
        return found.exit_code, found.output

    right = ("--evaluate", "--gpus-per-node", "4", "--", "m", "gqa", "--out", "e")
    code, text = launch(*right)
    assert code == 0 and "evaluate_rank m gqa --out e" in text and "--job-name=evaluate-e" in text
    for arguments, said in (
        (("--evaluate", "--", "m", "gqa"), "--out"),
        (("--evaluate", "--", "m", "gqaa", "--out", "e"), "unknown task 'gqaa'"),
        (("--evaluate", "--", "m", "gqa", "--prompt", "x", "--out", "e"), "no prompt 'x'"),
        (("--evaluate", "--", "m", "gqa", "--ranks", "2", "--out", "e"), "--ranks 2"),
        (("--evaluate", "--", "m", "gqa", "--adapter", "a=b", "--out", "e"), "--adapter a=b in a"),
        (("--evaluate", "--", "m", "gqa", "--group", "3", "--out", "e"), "--group 3 with"),
        (("--evaluate", "--", "--out", "e", "m", "gqa"), "stands before the model"),
        (("--evaluate", "--set", "a=b", "--", "m", "gqa", "--out", "e"), "--set"),
        (("toy/align_image", "gqa"), "add --evaluate"),
    ):
        code, text = launch(*arguments)
        assert code == 2 and said in text, (arguments, text)
