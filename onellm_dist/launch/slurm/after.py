"""What a job script asks around a start of the run: `begin` before the ranks start, `end` after they ended: go on, requeue, or stop?

    python -m onellm_dist.launch.slurm.after begin RUN_DIR --ranks-per-node N --grace-period SECONDS
    python -m onellm_dist.launch.slurm.after end RUN_DIR --launcher-status N --stop-asked TIME --max-requeues N

`end` explains itself on stderr and prints one line on stdout: VERDICT DELAY_SECONDS EXIT_CODE, the verdict being done, requeue or halt.
It reads `exit.json` (launchers blur exit codes) and the history in `attempts.jsonl`. It imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from onellm_dist.launch.slurm.attempts import (
    LOST,
    RUNNING,
    TIME_FORMAT,
    Attempt,
    append_attempt,
    now,
    read_attempts,
    this_attempt,
)

CODES = {"done": EXIT_DONE, "failed": EXIT_FAILED, "usage": EXIT_USAGE, "preempted": EXIT_PREEMPTED}
FIRST_DELAY_S, LONGEST_DELAY_S = 60, 3600
PREEMPTED_DELAY_S = 15
"""Nodes refuse a job that they ended in the same second ("credential revoked", Slurm 22.05), and their clocks differ a little."""
SHOWN_SUSPECTS = 8
TAIL_BYTES = 1 << 18
PREFLIGHT, BAD_NODES = "preflight", "bad_nodes"
"""How a preflight's reason begins; the file in the run directory, one a start, that names the nodes to keep away from: the verdict."""
NO_NODE = f"{PREFLIGHT}: see above; no node is to blame by itself"


@dataclass(frozen=True)
class Verdict:
    """What the job script is to do."""

    word: str
    """done, requeue or halt."""
    delay_s: int
    exit_code: int
    why: str
    """For people."""


def begin(run_dir: Path, env: Mapping[str, str], *, ranks_per_node: int = 0) -> None:
    """Record this start, and take away how the last one ended: what `end` reads must be this start's."""
    before = read_attempts(run_dir)
    if (
        before and before[-1].status == RUNNING
    ):  # nobody wrote its end: node or job script were killed
        step = steps_reached(run_dir, before[-1])
        append_attempt(
            run_dir,
            replace(
                before[-1],
                status=LOST,
                steps_done=step,
                failed_step=step,
                checkpoint=newest_checkpoint(run_dir),
            ),
        )
    (run_dir / "exit.json").unlink(missing_ok=True)
    started = this_attempt(env)
    append_attempt(run_dir, replace(started, ranks=len(started.nodes) * ranks_per_node or None))


def grace_period_warning(run_dir: Path, grace_period_s: int) -> str:
    """What to say where the last checkpoint took more than half of the job's grace period; else nothing."""
    took = last_save_s(run_dir)
    if took is None or 2 * took <= grace_period_s:
        return ""
    return (
        f"warning: the last checkpoint took {took:.0f} s, the grace period before the time limit is {grace_period_s} s.\n"
        f"A stop may come too late for a checkpoint.\nRender the job again with --grace-period {max(60, round(4 * took))}.\n"
    )


def end(
    run_dir: Path,
    env: Mapping[str, str],
    *,
    launcher_status: int,
    stop_asked: float,
    max_requeues: int,
    preflight_status: int = 0,
) -> Verdict:
    """Record how this start ended and decide what follows."""
    attempts = read_attempts(run_dir)
    key = this_attempt(env)
    started = next(
        (a for a in attempts if (a.job_id, a.restart_count) == (key.job_id, key.restart_count)), key
    )
    earlier = [
        a for a in attempts if (a.job_id, a.restart_count) != (key.job_id, key.restart_count)
    ]
    if preflight_status:
        ended = refused_by_preflight(run_dir, started, preflight_status, stop_asked=stop_asked)
    else:
        ended = how_it_ended(
            run_dir, started, launcher_status=launcher_status, stop_asked=stop_asked
        )
    verdict = decide(ended, earlier, max_requeues=max_requeues)
    append_attempt(run_dir, replace(ended, action=verdict.word, delay_s=verdict.delay_s))
    return verdict


def how_it_ended(
    run_dir: Path, started: Attempt, *, launcher_status: int, stop_asked: float
) -> Attempt:
    """The attempt as `exit.json` tells it; where no rank wrote one, as the launcher and the stop tell it.

    Args:
        stop_asked: when the job script was asked to stop (seconds since 1970); 0 where it was not.
    """
    over = replace(started, end=now(), checkpoint=newest_checkpoint(run_dir))
    found = _read_json(run_dir / "exit.json")
    # Failed after it: a second signal, or time ran out in the middle of the checkpoint. Failed before: the stop came of the failure.
    if (
        stop_asked
        and found.get("status") == "failed"
        and (run_dir / "exit.json").stat().st_mtime >= stop_asked
    ):
        reason = f"stopped before its checkpoint was whole: {found.get('reason', '')}"
        return replace(over, status="preempted", steps_done=found.get("steps_done"), reason=reason)
    if found.get("status") in CODES:
        return replace(
            over,
            status=found["status"],
            steps_done=found.get("steps_done"),
            failed_step=found.get("failed_step"),
            reason=str(found.get("reason", "")),
            offending_samples=tuple(str(s) for s in found.get("offending_samples") or ()),
        )
    step = steps_reached(run_dir, started)
    if stop_asked:
        return replace(
            over,
            status="preempted",
            steps_done=step,
            reason="stopped before the ranks could write a checkpoint",
        )
    if launcher_status == EXIT_USAGE:
        return replace(
            over,
            status="usage",
            steps_done=step,
            reason="the launcher or the recipe refused the command line (see above)",
        )
    reason = f"the ranks ended without exit.json; the launcher's exit code is {launcher_status}"
    return replace(over, status="failed", steps_done=step, failed_step=step, reason=reason)


def refused_by_preflight(
    run_dir: Path, started: Attempt, status: int, *, stop_asked: float
) -> Attempt:
    """The attempt that no rank was started for. A preflight that left no verdict (its ranks never started, or were killed) says nothing
    about the nodes: it is a failed start like others.
    """
    over = replace(started, end=now(), checkpoint=newest_checkpoint(run_dir))
    if stop_asked:
        return replace(over, status="preempted", reason=f"{PREFLIGHT}: stopped in it")
    if status == EXIT_USAGE:
        return replace(
            over,
            status="usage",
            reason=f"{PREFLIGHT}: the recipe or the command line is wrong (see above)",
        )
    path = run_dir / f"{BAD_NODES}.{started.job_id}.{started.restart_count}"
    if not path.exists():
        return replace(
            over,
            status="failed",
            reason=f"{PREFLIGHT}: ended without a verdict; its exit code is {status}",
        )
    bad = path.read_text(encoding="utf-8").split()
    return replace(
        over, status="failed", reason=f"{PREFLIGHT}: bad nodes {', '.join(bad)}" if bad else NO_NODE
    )


def decide(ended: Attempt, earlier: Sequence[Attempt], *, max_requeues: int) -> Verdict:
    """Done, requeue with a back-off, or halt.

    Halts where the command line is wrong, where the preflight blames no node, where two starts failed at the same step with nothing got
    past it in between (a crash loop), and after `max_requeues` failures in a row of which none wrote a new checkpoint. Preemptions are
    never counted; starts that failed before a step have the limit alone, for they may have failed of different things.
    """
    place = _place(ended) if ended.status == "failed" else ended.steps_done
    at = f"at step {place}" if place is not None else "before the first step"
    if ended.status == "done":
        return Verdict("done", 0, EXIT_DONE, f"done: {ended.reason}")
    if ended.status == "usage":
        return Verdict(
            "halt",
            0,
            EXIT_USAGE,
            f"halted: {ended.reason}\nThe same command would be refused again.\nMend the recipe or the job script and submit it anew.",
        )
    if ended.status == "preempted":
        return Verdict(
            "requeue",
            PREEMPTED_DELAY_S,
            EXIT_PREEMPTED,
            f"preempted ({ended.reason}) {at}: requeued, goes on from its newest checkpoint",
        )
    if ended.reason == NO_NODE:
        return Verdict(
            "halt",
            0,
            EXIT_FAILED,
            f"halted: {ended.reason}\nAnother start would be refused too.\nMend what it names and submit the job anew.",
        )
    twin = _same_step(ended, earlier)
    if twin is not None:
        return Verdict("halt", 0, EXIT_FAILED, _crash_loop(ended, twin, at))
    in_a_row = 1 + _failures_in_a_row(ended, earlier)
    if in_a_row > max_requeues:
        why = f"halted: {in_a_row} failures in a row without a new checkpoint, {max_requeues} requeues are allowed (--max-requeues)."
        return Verdict(
            "halt",
            0,
            EXIT_FAILED,
            f"{why}\nThe last one, {at}: {ended.reason}\nMend its cause and submit the job anew: it goes on from the newest checkpoint.",
        )
    delay = min(FIRST_DELAY_S * 2 ** (in_a_row - 1), LONGEST_DELAY_S)
    return Verdict(
        "requeue",
        delay,
        EXIT_FAILED,
        f"failed {at}: {ended.reason}\nrequeued in {delay} s (failure {in_a_row} of {max_requeues} in a row)",
    )


def steps_reached(run_dir: Path, attempt: Attempt) -> int | None:
    """Steps done, for a start that could not say it itself; None where it never came to training.

    `metrics.jsonl` alone does not tell: it holds the lines of earlier starts until the event `start`.
    """
    event = next(
        (
            e
            for e in _newest_first(run_dir / "events.jsonl", most=None)
            if e.get("event") == "start"
        ),
        None,
    )
    if event is None or not _is_of(event, attempt):
        return None
    return next(
        (
            int(line["step"]) + 1
            for line in _newest_first(run_dir / "metrics.jsonl")
            if "step" in line
        ),
        event.get("first_step"),
    )


def _is_of(event: Mapping[str, Any], attempt: Attempt) -> bool:
    """Whether an event `start` is this start's. Ranks under ssh do not know the job's number; rank 0's node has the script's clock."""
    if event.get("slurm_job_id") is not None:
        return (str(event["slurm_job_id"]), event.get("slurm_restart_count") or 0) == (
            attempt.job_id,
            attempt.restart_count,
        )
    try:
        return datetime.strptime(str(event.get("time")), TIME_FORMAT) >= datetime.strptime(
            attempt.start, TIME_FORMAT
        )
    except ValueError:
        return False


def last_save_s(run_dir: Path) -> float | None:
    """Seconds that the newest checkpoint took, by `events.jsonl`."""
    events = _newest_first(run_dir / "events.jsonl")
    return next(
        (
            float(line["seconds"])
            for line in events
            if line.get("event") == "checkpoint" and "seconds" in line
        ),
        None,
    )


def _newest_first(path: Path, most: int | None = TAIL_BYTES) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file's last bytes (None: all), without those cut short."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0 if most is None else max(0, size - most))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def newest_checkpoint(run_dir: Path) -> int | None:
    """Step of the newest checkpoint; a checkpoint has its name only when it is whole."""
    names = [f.name.removeprefix("step-") for f in (run_dir / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def _place(attempt: Attempt) -> int | None:
    """The step that a failed start was at; None where it came to none. Between steps (in a validation, a checkpoint) it is known by the
    steps done, which a start has at once that goes on from a checkpoint.
    """
    if attempt.failed_step is not None:
        return attempt.failed_step
    return attempt.steps_done if (attempt.steps_done or 0) > (attempt.checkpoint or 0) else None


def _same_step(ended: Attempt, earlier: Sequence[Attempt]) -> Attempt | None:
    """An earlier failure at the same step, nothing having got past that step since; None for a start that came to no step."""
    place = _place(ended)
    if place is None:
        return None
    for attempt in reversed(earlier):
        if attempt.status == "failed" and _place(attempt) == place:
            return attempt
        if (attempt.steps_done or 0) > place:
            return None
    return None


def _failures_in_a_row(ended: Attempt, earlier: Sequence[Attempt]) -> int:
    """Failed and lost starts just before this one, back to the last that ended well or with another newest checkpoint."""
    count = 0
    for attempt in reversed(earlier):
        if attempt.status not in ("failed", LOST) or attempt.checkpoint != ended.checkpoint:
            break
        count += 1
    return count


def _crash_loop(ended: Attempt, twin: Attempt, at: str) -> str:
    common = [s for s in ended.offending_samples if s in set(twin.offending_samples)] or list(
        ended.offending_samples
    )
    lines = [f"halted: two starts failed {at}, another would too.", f"Now: {ended.reason}"]
    if twin.reason != ended.reason:
        lines.append(f"Before: {twin.reason}")
    if common:
        rest = (
            f" and {len(common) - SHOWN_SUSPECTS} more (attempts.jsonl)"
            if len(common) > SHOWN_SUSPECTS
            else ""
        )
        lines.append(
            f"Suspect samples (of the micro-step that failed): {', '.join(common[:SHOWN_SUSPECTS])}{rest}"
        )
        lines.append(
            "Look at them (`onellm shards preview`), mend or leave them out (`onellm shards repair`), and submit the job anew."
        )
    else:
        lines.append(
            "No sample is suspected. Look for the cause in the job's log, mend it, and submit the job anew."
        )
    return "\n".join(lines)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def main(arguments: Sequence[str]) -> int:
    """The command line: see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m onellm_dist.launch.slurm.after",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "end"):
        commands.add_parser(name).add_argument("run_dir", type=Path)
    commands.choices["begin"].add_argument("--ranks-per-node", type=int, default=0)
    commands.choices["begin"].add_argument("--grace-period", type=int, default=0)
    ending = commands.choices["end"]
    ending.add_argument("--launcher-status", type=int, required=True)
    ending.add_argument("--stop-asked", type=float, default=0.0)
    ending.add_argument("--max-requeues", type=int, default=5)
    ending.add_argument("--preflight-status", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.command == "begin":
        begin(given.run_dir, os.environ, ranks_per_node=given.ranks_per_node)
        if given.grace_period:
            print(grace_period_warning(given.run_dir, given.grace_period), end="", file=sys.stderr)
        return EXIT_DONE
    verdict = end(
        given.run_dir,
        os.environ,
        launcher_status=given.launcher_status,
        stop_asked=given.stop_asked,
        max_requeues=given.max_requeues,
        preflight_status=given.preflight_status,
    )
    print(verdict.why, file=sys.stderr)
    print(verdict.word, verdict.delay_s, verdict.exit_code)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
