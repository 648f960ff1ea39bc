"""The decision that follows each start of a job: finish, requeue it, or halt."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common import run_files
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from onellm_dist.launch.slurm.attempts import LOST, Attempt
from onellm_dist.launch.slurm.run_progress import read_json

FIRST_DELAY_S = 60
LONGEST_DELAY_S = 3600
PREEMPTED_DELAY_S = 15
"""A node refuses a job that it ended within the same second ("credential revoked", Slurm 22.05),
and the nodes' clocks differ slightly."""
SHOWN_SAMPLES = 8
SHOWN_COMMANDS = 3
NO_BAD_NODE = "preflight: see above; no single node is at fault"
"""Reason of an attempt whose preflight failed without naming a node to avoid."""


@dataclass(frozen=True)
class NextAction:
    """What the job script does after a start."""

    action: str
    """done, requeue or halt."""
    delay_s: int
    """Seconds before the requeued job may start."""
    exit_code: int
    message: str
    """Explanation for people."""


def choose_action(
    ended: Attempt,
    earlier: Sequence[Attempt],
    *,
    max_requeues: int,
    run_dir: Path = Path("RUN"),
) -> NextAction:
    """Choose between done, requeue with a back-off, and halt.

    The job halts if the command line is wrong, if the preflight failed without naming a bad node,
    if two starts failed at the same step with no progress beyond it in between (a crash loop), and
    after `max_requeues` failures in a row without a new checkpoint. Preemptions are never counted,
    nor are starts that lowered the token budgets: the next one differs, and budgets have an end.
    Starts that failed before their first step are only limited by `max_requeues`, because their
    causes may differ.

    Args:
        ended: the attempt that has just ended.
        earlier: the attempts before it, in order.
        max_requeues: allowed failures in a row without a new checkpoint.
        run_dir: the run directory, for the commands that a message gives.
    """
    if ended.status == "done":
        return NextAction("done", 0, EXIT_DONE, f"done: {ended.reason}")
    if ended.status == "usage":
        remedy = (
            "The same command would be refused again.\n"
            "Fix the recipe or the job script and submit it again."
        )
        return _halt(f"{ended.reason}\n{remedy}", EXIT_USAGE)
    if ended.status == "preempted":
        message = (
            f"preempted ({ended.reason}) {_format_step(ended.steps_done)}: requeued, "
            "resumes from the latest checkpoint"
        )
        return NextAction("requeue", PREEMPTED_DELAY_S, EXIT_PREEMPTED, message)
    if ended.budget_lowered:
        message = f"out of memory {_format_step(ended.failed_step)}: {ended.reason}\nrequeued"
        return NextAction("requeue", PREEMPTED_DELAY_S, EXIT_FAILED, message)
    if ended.reason == NO_BAD_NODE:
        remedy = (
            "Another start would be refused too.\n"
            "Fix what the preflight reported and submit the job again."
        )
        return _halt(f"{ended.reason}\n{remedy}")
    earlier_failure = _find_same_failure(ended, earlier)
    if earlier_failure is not None:
        return _halt(_describe_crash_loop(ended, earlier_failure, run_dir))
    return _retry(ended, 1 + count_failures_in_a_row(ended, earlier), max_requeues)


def _halt(message: str, exit_code: int = EXIT_FAILED) -> NextAction:
    return NextAction("halt", 0, exit_code, f"halted: {message}")


def _retry(ended: Attempt, failures: int, max_requeues: int) -> NextAction:
    """Requeue after a failure with twice the previous delay, or halt at the limit."""
    at = _format_step(_get_failure_step(ended))
    if failures > max_requeues:
        return _halt(
            f"{failures} failures in a row without a new checkpoint; --max-requeues allows "
            f"{max_requeues}.\nThe last one, {at}: {ended.reason}\n"
            "Fix the cause and submit the job again: it resumes from the latest checkpoint."
        )
    delay = compute_delay(failures)
    message = (
        f"failed {at}: {ended.reason}\n"
        f"requeued in {delay} s (failure {failures} of {max_requeues} in a row)"
    )
    return NextAction("requeue", delay, EXIT_FAILED, message)


def compute_delay(failures: int) -> int:
    """Seconds to wait before the next start, doubled with each failure in a row."""
    delay: int = FIRST_DELAY_S * 2 ** (failures - 1)
    return min(delay, LONGEST_DELAY_S)


def _format_step(step: int | None) -> str:
    return f"at step {step}" if step is not None else "before the first step"


def _get_failure_step(attempt: Attempt) -> int | None:
    """The step at which an attempt failed; None if it failed before any step.

    A failure between two steps (in a validation, in a checkpoint) is placed by the steps done.
    Right after a resume that count is the checkpoint's, and says nothing about this attempt.
    """
    if attempt.failed_step is not None:
        return attempt.failed_step
    return attempt.steps_done if (attempt.steps_done or 0) > (attempt.checkpoint or 0) else None


def _find_same_failure(ended: Attempt, earlier: Sequence[Attempt]) -> Attempt | None:
    """An earlier failure at the same step, if no attempt has got past that step since."""
    step = _get_failure_step(ended)
    if step is None:
        return None
    for attempt in _drop_lowerings(earlier):
        if attempt.status == "failed" and _get_failure_step(attempt) == step:
            return attempt
        if (attempt.steps_done or 0) > step:
            return None
    return None


def count_failures_in_a_row(ended: Attempt, earlier: Sequence[Attempt]) -> int:
    """Failed and lost attempts directly before `ended` that had the same newest checkpoint."""
    count = 0
    for attempt in _drop_lowerings(earlier):
        if attempt.status not in ("failed", LOST) or attempt.checkpoint != ended.checkpoint:
            break
        count += 1
    return count


def _drop_lowerings(earlier: Sequence[Attempt]) -> list[Attempt]:
    """The attempts, the newest first, without those that lowered the token budgets."""
    return [attempt for attempt in reversed(earlier) if not attempt.budget_lowered]


def _describe_crash_loop(ended: Attempt, earlier: Attempt, run_dir: Path) -> str:
    at = _format_step(_get_failure_step(ended))
    lines = [f"two starts failed {at}; another one would fail too.", f"Now: {ended.reason}"]
    if earlier.reason != ended.reason:
        lines.append(f"Before: {earlier.reason}")
    shared = [s for s in ended.offending_samples if s in set(earlier.offending_samples)]
    samples = shared or list(ended.offending_samples)
    if samples:
        more = len(samples) - SHOWN_SAMPLES
        rest = f" and {more} more (attempts.jsonl)" if more > 0 else ""
        lines += [
            f"Samples of the micro-batch that failed: {', '.join(samples[:SHOWN_SAMPLES])}{rest}",
            *_make_commands(samples, run_dir),
        ]
    else:
        lines.append(
            "No sample is under suspicion. Find the cause in the job's log, fix it, and submit "
            "the job again."
        )
    return "\n".join(lines)


def _make_commands(samples: Sequence[str], run_dir: Path) -> list[str]:
    """The way out: commands that show the samples, and that leave them out of the run.

    Args:
        samples: their ids, `dataset/shard/key@epoch`.
        run_dir: the run directory.
    """
    folders = read_json(run_dir / run_files.SAMPLES / run_files.DATASETS)
    links = " --follow-links" if _follows_links(run_dir) else ""
    lines = ["Look at them:"]
    for sample in samples[:SHOWN_COMMANDS]:
        dataset, _, rest = sample.rpartition("@")[0].partition("/")
        key = rest.partition("/")[2]
        folder = str(folders.get(dataset, dataset))
        command = f"onellm shards preview {shlex.quote(folder)} --key {shlex.quote(key)}"
        lines.append(f"  {command}{links}")
    names = " ".join(shlex.quote(sample) for sample in samples)
    return [
        *lines,
        "Leave the bad ones out (all others stay where they are):",
        f"  onellm samples exclude {shlex.quote(str(run_dir))} {names}",
        "Then submit the job again: it resumes from the latest checkpoint.",
    ]


def _follows_links(run_dir: Path) -> bool:
    """Whether the run reads tars that are links out of their dataset's folder."""
    try:
        text = (run_dir / run_files.CONFIG).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    # As RunConfig.to_yaml writes it: the job script's Python needs no PyYAML.
    return re.search(r"^  follow_links: true$", text, re.MULTILINE) is not None
