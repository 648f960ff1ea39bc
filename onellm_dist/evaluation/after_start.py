"""What the job script of an evaluation runs around each start, as `launch.slurm.after` does.

    python -m onellm_dist.evaluation.after_start begin OUT --ranks-per-node N --grace-period SECONDS
    python -m onellm_dist.evaluation.after_start end OUT --launcher-status N --stop-asked TIME \
--max-requeues N [--tasks TASK...]

`end` prints one line on stdout: ACTION DELAY_SECONDS EXIT_CODE. It counts the answers that are
there; their number is what an attempt has for steps and checkpoints.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from onellm_dist.common.output import write_error, write_output
from onellm_dist.common.refusals import find_refusal
from onellm_dist.common.run_files import STOP
from onellm_dist.evaluation.answer_folder import (
    TASK_FILE,
    count_answered_lines,
    read_answers,
    read_questions,
)
from onellm_dist.launch.slurm.after import describe_preflight_failure, name_meeting_point
from onellm_dist.launch.slurm.attempts import (
    LOST,
    RUNNING,
    Attempt,
    append_attempt,
    get_local_time,
    make_attempt,
    read_attempts,
)
from onellm_dist.launch.slurm.next_action import (
    NO_BAD_NODE,
    PREEMPTED_DELAY_S,
    NextAction,
    compute_delay,
    count_failures_in_a_row,
)


@dataclass(frozen=True)
class End:
    """How a start ended, as the job script knows it."""

    launcher_status: int
    """Exit code of the launcher."""
    stop_asked: float = 0.0
    """When the script was asked to stop, in seconds since 1970; 0 if it was not."""
    preflight_status: int = 0
    """Exit code of the preflight; 0 if it passed or there was none."""


def record_begin(out: Path, env: Mapping[str, str], *, ranks_per_node: int = 0) -> None:
    """Record a start in `attempts.jsonl`, and remove a request to stop of the one before.

    Args:
        out: folder of the answers.
        env: Slurm's variables.
        ranks_per_node: ranks that the job script starts on each node; 0 if unknown.
    """
    (out / STOP).unlink(missing_ok=True)
    attempts, answers = read_attempts(out), count_answered_lines(out)
    if attempts and attempts[-1].status == RUNNING:  # the node or the job script was killed
        lost = replace(attempts[-1], status=LOST, steps_done=answers, checkpoint=answers)
        append_attempt(out, lost)
    attempt = make_attempt(env)
    append_attempt(out, replace(attempt, ranks=len(attempt.nodes) * ranks_per_node or None))


def record_end(
    out: Path, env: Mapping[str, str], tasks: Sequence[str], end: End, *, max_requeues: int
) -> NextAction:
    """Record how this start ended and choose what follows.

    Args:
        out: folder of the answers.
        env: Slurm's variables.
        tasks: the tasks that are asked; (): the exit code alone says whether all was answered.
        end: how the start ended.
        max_requeues: allowed failures in a row without a new answer.
    """
    stopped = bool(end.stop_asked) or end.launcher_status == EXIT_PREEMPTED or (out / STOP).exists()
    (out / STOP).unlink(missing_ok=True)
    current = make_attempt(env)
    key = (current.job_id, current.restart_count)
    attempts = read_attempts(out)
    started = next((a for a in attempts if (a.job_id, a.restart_count) == key), current)
    earlier = [a for a in attempts if (a.job_id, a.restart_count) != key]
    answers = count_answered_lines(out)
    started = replace(started, end=get_local_time(), steps_done=answers, checkpoint=answers)
    if end.preflight_status:
        ended = describe_preflight_failure(
            out, started, end.preflight_status, stop_asked=end.stop_asked
        )
    else:
        ended = _describe_end(out, started, tasks, end, env, stopped=stopped)
    action = _choose_action(ended, earlier, max_requeues)
    append_attempt(out, replace(ended, action=action.action, delay_s=action.delay_s))
    return action


def count_missing(out: Path, tasks: Sequence[str]) -> dict[str, int | None]:
    """Questions of tasks without an answer: task -> number; None: it was not begun.

    Raises:
        OneLLMError: files of answers are damaged.
    """
    missing: dict[str, int | None] = {}
    for task in tasks:
        folder = out / task
        if not (folder / TASK_FILE).is_file():
            missing[task] = None
            continue
        answered = read_answers(folder).keys()
        left = sum(question.id not in answered for question in read_questions(folder))
        if left:
            missing[task] = left
    return missing


def _describe_end(
    out: Path,
    started: Attempt,
    tasks: Sequence[str],
    end: End,
    env: Mapping[str, str],
    *,
    stopped: bool,
) -> Attempt:
    """Complete an attempt from the answers, else from what a rank said, else from the exit code."""
    missing = count_missing(out, tasks)
    if end.launcher_status == EXIT_DONE and not missing:
        return replace(
            started, status="done", reason=format_count(started.steps_done or 0, "answer")
        )
    job = f"{started.job_id}.{started.restart_count}"
    said = find_refusal(out, job, start=name_meeting_point(started, env), since=started.start)
    if said is not None and said.get("status") == "usage":
        return replace(started, status="usage", reason=str(said.get("reason", "")))
    if end.launcher_status == EXIT_USAGE:  # of the ranks that evaluate-run starts, too
        return replace(started, status="usage", reason="wrong usage: the job's log says what")
    if stopped:
        return replace(started, status="preempted", reason="asked to stop")
    left = ", ".join(f"{task}: {'all' if n is None else f'{n:,}'}" for task, n in missing.items())
    reason = str(said.get("reason", "")) if said is not None else ""
    reason = reason or f"the launcher's exit code is {end.launcher_status}"
    return replace(started, status="failed", reason=f"{reason}\nnot answered: {left or 'none'}")


def _choose_action(ended: Attempt, earlier: Sequence[Attempt], max_requeues: int) -> NextAction:
    if ended.status == "done":
        return NextAction("done", 0, EXIT_DONE, f"done: {ended.reason}")
    if ended.status == "usage":
        return NextAction("halt", 0, EXIT_USAGE, f"halted: {ended.reason}")
    if ended.status == "preempted":
        done = format_count(ended.steps_done or 0, "answer")
        message = f"preempted after {done}: requeued, the rest follows"
        return NextAction("requeue", PREEMPTED_DELAY_S, EXIT_PREEMPTED, message)
    failures = 1 + count_failures_in_a_row(ended, earlier)
    if failures > max_requeues or ended.reason == NO_BAD_NODE:
        message = (
            f"halted: {failures} failures in a row without a new answer.\n{ended.reason}\n"
            "Fix the cause and submit the job again: what is missing is answered."
        )
        return NextAction("halt", 0, EXIT_FAILED, message)
    delay = compute_delay(failures)
    message = (
        f"failed: {ended.reason}\n"
        f"requeued in {delay} s (failure {failures} of {max_requeues} without a new answer)"
    )
    return NextAction("requeue", delay, EXIT_FAILED, message)


def main(arguments: Sequence[str]) -> int:
    """Run the command line that the module's docstring describes."""
    parser = argparse.ArgumentParser(
        prog="python -m onellm_dist.evaluation.after_start",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    begin, end = commands.add_parser("begin"), commands.add_parser("end")
    for command in (begin, end):
        command.add_argument("out", type=Path)
    begin.add_argument("--ranks-per-node", type=int, default=0)
    begin.add_argument("--grace-period", type=int, default=0)
    end.add_argument("--launcher-status", type=int, required=True)
    end.add_argument("--stop-asked", type=float, default=0.0)
    end.add_argument("--preflight-status", type=int, default=0)
    end.add_argument("--max-requeues", type=int, default=5)
    end.add_argument("--tasks", nargs="+", default=[])
    given = parser.parse_args(arguments)
    if given.command == "begin":
        record_begin(given.out, os.environ, ranks_per_node=given.ranks_per_node)
        return EXIT_DONE
    ended = End(given.launcher_status, given.stop_asked, given.preflight_status)
    action = record_end(given.out, os.environ, given.tasks, ended, max_requeues=given.max_requeues)
    write_error(action.message)
    write_output(f"{action.action} {action.delay_s} {action.exit_code}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
