"""What a job script runs around each start: `begin` before the ranks start, `end` after they ended.

    python -m onellm_dist.launch.slurm.after begin RUN_DIR --ranks-per-node N --grace-period SECONDS
    python -m onellm_dist.launch.slurm.after end RUN_DIR --launcher-status N --stop-asked TIME \
--max-requeues N

`end` explains itself on stderr and prints one line on stdout: ACTION DELAY_SECONDS EXIT_CODE, where
ACTION is done, requeue or halt. It reads `exit.json`, because launchers do not pass exit codes on
reliably, and the history in `attempts.jsonl`. It imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onellm_dist.common import run_files
from onellm_dist.common.errors import EXIT_CODES, EXIT_DONE, EXIT_USAGE
from onellm_dist.common.output import write_error, write_output
from onellm_dist.common.refusals import describe_start, find_refusal
from onellm_dist.launch.slurm.attempts import (
    ADDRESS_VARIABLE,
    LOST,
    PORT_VARIABLE,
    RUNNING,
    Attempt,
    append_attempt,
    count_attempts,
    get_local_time,
    make_attempt,
    read_attempts,
)
from onellm_dist.launch.slurm.environment import compute_port
from onellm_dist.launch.slurm.next_action import NO_BAD_NODE, NextAction, choose_action
from onellm_dist.launch.slurm.run_progress import (
    count_steps_done,
    find_newest_checkpoint,
    get_checkpoint_seconds,
    read_json,
)
from onellm_dist.launch.variables import read_number

LEAST_GRACE_PERIOD_S = 60


def record_begin(run_dir: Path, env: Mapping[str, str], *, ranks_per_node: int = 0) -> None:
    """Record a start in `attempts.jsonl`, and remove the `exit.json` of the one before.

    Args:
        run_dir: the run directory.
        env: see `make_attempt`.
        ranks_per_node: ranks that the job script starts on each node; 0 if unknown.
    """
    attempts = read_attempts(run_dir)
    if attempts and attempts[-1].status == RUNNING:
        # Nobody recorded its end: the node or the job script was killed.
        steps_done = count_steps_done(run_dir, attempts[-1])
        lost = replace(
            attempts[-1],
            status=LOST,
            steps_done=steps_done,
            failed_step=steps_done,
            checkpoint=find_newest_checkpoint(run_dir),
        )
        append_attempt(run_dir, lost)
    (run_dir / run_files.EXIT).unlink(missing_ok=True)
    attempt = make_attempt(env, earlier=count_attempts(attempts, env))
    ranks = len(attempt.nodes) * ranks_per_node or None
    append_attempt(run_dir, replace(attempt, ranks=ranks))


def get_grace_period_warning(run_dir: Path, grace_period_s: int) -> str:
    """A warning if the last checkpoint took more than half of the job's grace period; else ""."""
    seconds = get_checkpoint_seconds(run_dir)
    if seconds is None or 2 * seconds <= grace_period_s:
        return ""
    longer = max(LEAST_GRACE_PERIOD_S, round(4 * seconds))
    return (
        f"warning: the last checkpoint took {seconds:.0f} s, and the grace period before the time "
        f"limit is {grace_period_s} s.\n"
        "A stop may come too late for a checkpoint.\n"
        f"Render the job script again with --grace-period {longer}.\n"
    )


def record_end(
    run_dir: Path,
    env: Mapping[str, str],
    *,
    launcher_status: int,
    stop_asked: float,
    max_requeues: int,
    preflight_status: int = 0,
) -> NextAction:
    """Record how this start ended and choose what follows.

    Args:
        run_dir: the run directory.
        env: see `make_attempt`.
        launcher_status: exit code of the launcher.
        stop_asked: when the job script was asked to stop, in seconds since 1970; 0 if it was not.
        max_requeues: allowed failures in a row without a new checkpoint.
        preflight_status: exit code of the preflight; 0 if it passed or there was none.
    """
    attempts = read_attempts(run_dir)
    current = make_attempt(env, earlier=max(0, count_attempts(attempts, env) - 1))
    key = (current.job_id, current.restart_count)
    started = next((a for a in attempts if (a.job_id, a.restart_count) == key), current)
    earlier = [a for a in attempts if (a.job_id, a.restart_count) != key]
    started = replace(started, end=get_local_time(), checkpoint=find_newest_checkpoint(run_dir))
    if preflight_status:
        ended = describe_preflight_failure(
            run_dir, started, preflight_status, stop_asked=stop_asked
        )
    else:
        ended = describe_end(
            run_dir,
            started,
            launcher_status=launcher_status,
            stop_asked=stop_asked,
            meeting_point=name_meeting_point(started, env),
        )
    action = choose_action(ended, earlier, max_requeues=max_requeues, run_dir=run_dir)
    append_attempt(run_dir, replace(ended, action=action.action, delay_s=action.delay_s))
    return action


def describe_end(
    run_dir: Path,
    started: Attempt,
    *,
    launcher_status: int,
    stop_asked: float,
    meeting_point: str = "",
) -> Attempt:
    """Complete an attempt from `exit.json`, else from its refusal or the launcher's status.

    Args:
        run_dir: the run directory.
        started: the attempt, its end filled in.
        launcher_status: exit code of the launcher.
        stop_asked: when the job script was asked to stop, in seconds since 1970; 0 if it was not.
        meeting_point: see `name_meeting_point`.
    """
    exit_file = run_dir / run_files.EXIT
    found = read_json(exit_file)
    if stop_asked and found.get("status") == "failed" and exit_file.stat().st_mtime >= stop_asked:
        reason = f"stopped before its checkpoint was complete: {found.get('reason', '')}"
        steps_done = found.get("steps_done")
        return replace(started, status="preempted", steps_done=steps_done, reason=reason)
    if found.get("status") in EXIT_CODES:
        return replace(
            started,
            status=found["status"],
            steps_done=found.get("steps_done"),
            failed_step=found.get("failed_step"),
            reason=str(found.get("reason", "")),
            offending_samples=tuple(str(s) for s in found.get("offending_samples") or ()),
            budget_lowered=found.get("budget_lowered") is True,
        )
    job = f"{started.job_id}.{started.restart_count}"
    refusal = find_refusal(run_dir, job, start=meeting_point, since=started.start)
    if refusal is not None and refusal.get("status") in EXIT_CODES:
        return replace(started, status=refusal["status"], reason=str(refusal.get("reason", "")))
    started = replace(started, steps_done=count_steps_done(run_dir, started))
    if stop_asked:
        reason = "stopped before the ranks could write a checkpoint"
        return replace(started, status="preempted", reason=reason)
    # A status of 2 alone does not mean wrong usage: shells and srun use it for a missing command.
    reason = f"the ranks ended without exit.json; the launcher's exit code is {launcher_status}"
    return replace(started, status="failed", failed_step=started.steps_done, reason=reason)


def name_meeting_point(attempt: Attempt, env: Mapping[str, str]) -> str:
    """The name of a start whose ranks meet where the job script says, as they know it."""
    if env.get(ADDRESS_VARIABLE):
        return describe_start(env[ADDRESS_VARIABLE], read_number(env, PORT_VARIABLE), {})
    if not attempt.nodes or not attempt.job_id.isdigit():
        return ""
    port = compute_port(int(attempt.job_id), attempt.restart_count)
    return describe_start(attempt.nodes[0], port, {})


def describe_preflight_failure(
    run_dir: Path, started: Attempt, status: int, *, stop_asked: float
) -> Attempt:
    """Complete an attempt that started no ranks because its preflight did not pass.

    A preflight that left no list of bad nodes (its ranks never started, or were killed) says
    nothing about the nodes. It counts as an ordinary failed start.

    Args:
        run_dir: the run directory.
        started: the attempt, its end filled in.
        status: exit code of the preflight.
        stop_asked: when the job script was asked to stop, in seconds since 1970; 0 if it was not.
    """
    if stop_asked:
        return replace(started, status="preempted", reason="preflight: stopped while it ran")
    if status == EXIT_USAGE:
        reason = "preflight: the recipe or the command line is wrong (see above)"
        return replace(started, status="usage", reason=reason)
    path = run_dir / f"{run_files.BAD_NODES}.{started.job_id}.{started.restart_count}"
    if not path.exists():
        reason = f"preflight: ended without a result; its exit code is {status}"
        return replace(started, status="failed", reason=reason)
    nodes = path.read_text(encoding="utf-8").split()
    reason = f"preflight: bad nodes {', '.join(nodes)}" if nodes else NO_BAD_NODE
    return replace(started, status="failed", reason=reason)


def main(arguments: Sequence[str]) -> int:
    """Run the command line that the module's docstring describes."""
    parser = argparse.ArgumentParser(
        prog="python -m onellm_dist.launch.slurm.after",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    begin, end = commands.add_parser("begin"), commands.add_parser("end")
    for command in (begin, end):
        command.add_argument("run_dir", type=Path)
    begin.add_argument("--ranks-per-node", type=int, default=0)
    begin.add_argument("--grace-period", type=int, default=0)
    end.add_argument("--launcher-status", type=int, required=True)
    end.add_argument("--stop-asked", type=float, default=0.0)
    end.add_argument("--max-requeues", type=int, default=5)
    end.add_argument("--preflight-status", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.command == "begin":
        record_begin(given.run_dir, os.environ, ranks_per_node=given.ranks_per_node)
        if given.grace_period:
            warning = get_grace_period_warning(given.run_dir, given.grace_period)
            write_error(warning, end="")
        return EXIT_DONE
    action = record_end(
        given.run_dir,
        os.environ,
        launcher_status=given.launcher_status,
        stop_asked=given.stop_asked,
        max_requeues=given.max_requeues,
        preflight_status=given.preflight_status,
    )
    write_error(action.message)
    write_output(f"{action.action} {action.delay_s} {action.exit_code}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
