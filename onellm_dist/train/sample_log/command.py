"""`onellm samples`: the samples of a step, the steps of a sample, and what became of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.output import write_output
from onellm_dist.train.sample_log.status import RunStatus, StepStatus
from onellm_dist.train.sample_log.stream import RunStream, SampleUse

STATES = {"trained": "trained", "skipped": "skipped (not applied)", "planned": "still to come"}


def samples_command(run_dir: Path, step: int | None, key: str | None, *, as_json: bool) -> int:
    """Print the answer; a summary of the run where neither a step nor a sample is given.

    Args:
        run_dir: the run directory.
        step: index of a step.
        key: id of a sample, or the beginning of one.
        as_json: whether to print a JSON object.

    Returns:
        The exit code.

    Raises:
        UsageError: both were given, the directory is not a run's, or there is no such step or
            sample.
    """
    if step is not None and key is not None:
        raise UsageError(
            "--step and --sample were both given", "they are two questions.", "give one of them."
        )
    stream, status = RunStream(run_dir), RunStatus(run_dir)
    if step is not None:
        answer, text = describe_step(stream, status, step)
    elif key is not None:
        answer, text = describe_sample(stream, status, key)
    else:
        answer, text = describe_run(stream, status)
    write_output(json.dumps(answer, ensure_ascii=False) if as_json else "\n".join(text))
    return EXIT_DONE


def describe_step(
    stream: RunStream, status: RunStatus, step: int
) -> tuple[dict[str, Any], list[str]]:
    """The samples of a step, as a JSON object and as lines of text."""
    uses = stream.list_samples(step)
    own = status.get_status(step)
    rows: list[dict[str, Any]] = [
        {
            "id": use.sample_id,
            "dataset": use.sample.dataset,
            "shard": use.sample.shard_name,
            "key": use.sample.key,
            "epoch": use.epoch,
            "modalities": list(stream.get_modalities(use.sample.dataset)),
            "left_out": status.left_out.get(use.sample_id),
        }
        for use in uses
    ]
    answer = {
        "step": step,
        **own._asdict(),
        "steps_done": status.steps_done,
        "sample_digest": _compute_digest(uses),
        "samples": rows,
    }
    counts = Counter(use.sample.dataset for use in uses)
    shares = ", ".join(f"{n} {name}" for name, n in counts.items())
    text = [
        f"step {step}: {_format_status(own)}; {format_count(len(uses), 'sample')} ({shares})",
        f"sample_digest {answer['sample_digest']}",
    ]
    text += [
        f"  {row['id']}  {_format_modalities(row['modalities'])}{_format_reason(row['left_out'])}"
        for row in rows
    ]
    return answer, text


def describe_sample(
    stream: RunStream, status: RunStatus, key: str
) -> tuple[dict[str, Any], list[str]]:
    """The steps of a sample, as a JSON object and as lines of text.

    Args:
        stream: the stream of the run.
        status: what its directory says.
        key: id of the sample, or the beginning of one; with `@epoch` only this epoch is shown.
    """
    epoch = re.search(r"@(\d+)$", key)
    sample = stream.find_sample(key[: epoch.start()] if epoch else key)
    wanted = None if epoch is None else int(epoch.group(1))
    uses = [use for use in stream.list_uses(sample) if wanted in (None, use.epoch)]
    rows: list[dict[str, Any]] = [
        {
            "step": use.step,
            "epoch": use.epoch,
            **status.get_status(use.step)._asdict(),
            "left_out": status.left_out.get(use.sample_id),
        }
        for use in uses
    ]
    modalities = stream.get_modalities(sample.dataset)
    answer = {
        "sample": sample.name,
        "dataset": sample.dataset,
        "shard": sample.shard_name,
        "key": sample.key,
        "modalities": list(modalities),
        "steps_done": status.steps_done,
        "uses": rows,
    }
    done = sum(use.step < status.steps_done for use in uses)
    text = [
        f"{sample.name} ({_format_modalities(modalities)}): seen "
        f"{format_count(done, 'time')}, "
        f"{len(uses) - done} still to come (of {format_count(stream.steps, 'step')})"
    ]
    text += [
        f"  step {use.step}  epoch {use.epoch}  {_format_status(status.get_status(use.step))}"
        f"{_format_reason(row['left_out'])}"
        for use, row in zip(uses, rows, strict=True)
    ]
    return answer, text


def describe_run(stream: RunStream, status: RunStatus) -> tuple[dict[str, Any], list[str]]:
    """A summary of a run, as a JSON object and as lines of text."""
    lost = sum(end - first for first, end in status.lost)
    answer = {
        "steps": stream.steps,
        "steps_done": status.steps_done,
        "steps_saved": status.steps_saved,
        "skipped": sorted(status.skipped),
        "lost_steps": lost,
        "left_out": len(status.left_out),
        "datasets": stream.names,
    }
    text = [
        f"{status.steps_done} of {format_count(stream.steps, 'step')} done, {status.steps_saved} "
        "of them in a "
        "checkpoint",
        f"{format_count(len(status.skipped), 'step')} skipped, {lost} lost to restarts and "
        "repeated, "
        f"{format_count(len(status.left_out), 'sample')} left out",
        f"datasets: {', '.join(stream.names)}",
    ]
    return answer, text


def _compute_digest(uses: Sequence[SampleUse]) -> str:
    """The `sample_digest` of metrics.jsonl."""
    ids = sorted(use.sample_id.encode("utf-8") for use in uses)
    return hashlib.sha256(b"".join(name + b"\n" for name in ids)).hexdigest()


def _format_status(status: StepStatus) -> str:
    text = STATES[status.state]
    if status.state != "planned" and not status.saved:
        text += ", in no checkpoint yet"
    if status.times_lost:
        times = "once" if status.times_lost == 1 else f"{status.times_lost} times"
        text += f", done {times} before and lost to a restart"
    return text


def _format_modalities(modalities: Sequence[str]) -> str:
    return "+".join(modalities) or "text"


def _format_reason(reason: str | None) -> str:
    return "" if reason is None else f"  left out: {reason}"
