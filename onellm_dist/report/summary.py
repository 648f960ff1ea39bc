"""A run in figures, for the top of the page, the terminal and scripts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.progress import format_seconds
from onellm_dist.report.entries import to_number
from onellm_dist.report.facts import RunFacts
from onellm_dist.report.findings.finding import Finding
from onellm_dist.report.starts import Start, compute_resume_seconds
from onellm_dist.report.time_account import LABELS, split_seconds

RECENT_STEPS = 20
"""Steps at most from which the current loss and rate are computed; for the loss, at most a tenth of
a short run's steps."""
SHOWN_STARTS = 8


@dataclass(frozen=True)
class RunSummary:
    """The figures that people ask for first; None if the run has not recorded them."""

    status: str
    """Status of the latest start, or `none`."""
    reason: str
    steps_done: int
    steps_wanted: int | None
    """`train.steps` of the recipe."""
    loss: float | None
    """Mean of the last steps."""
    goodput: float | None
    """Share of the allocated time that made progress."""
    start_count: int
    lost_steps: int
    tokens_per_second: float | None
    """Median over the last steps of the latest start."""
    mfu: float | None
    """Median over all steps."""
    data_wait: float | None
    """Share of the time of all steps spent waiting for data."""
    eta_seconds: float | None
    """Time left; only while the run is running."""
    resume_seconds: float | None
    """Median over the restarts, from the end of the previous start to the first new step."""


def build_summary(facts: RunFacts) -> RunSummary:
    """Compute the summary of a run."""
    starts = facts.starts
    last = starts[-1] if starts else None
    steps = facts.records.steps
    typical = facts.incidents.typical_seconds
    recent = _get_values(steps[-max(1, min(RECENT_STEPS, len(steps) // 10)) :], "loss")
    rates = _get_values((last.steps if last else steps)[-RECENT_STEPS:], "tokens_per_second")
    mfu = _get_values(steps, "mfu")
    seconds = sum(to_number(s.get("seconds")) for s in steps)
    waited = sum(
        to_number(s.get("seconds")) * to_number(s.get("data_wait_fraction")) for s in steps
    )
    done = int(steps[-1]["step"]) + 1 if steps else int(last.first_step or 0) if last else 0
    wanted = facts.records.get_setting("train", "steps")
    wanted = wanted if isinstance(wanted, int) else None
    running = last is not None and last.status == "running"
    resumes = [s for start in starts[1:] if (s := compute_resume_seconds(start)) is not None]
    return RunSummary(
        status=last.status if last else "none",
        reason=last.reason if last else "no start is recorded",
        steps_done=done,
        steps_wanted=wanted,
        loss=sum(recent) / len(recent) if recent else None,
        goodput=facts.account.goodput,
        start_count=len(starts),
        lost_steps=sum(s.lost_steps for s in starts),
        tokens_per_second=statistics.median(rates) if rates else None,
        mfu=statistics.median(mfu) if mfu else None,
        data_wait=waited / seconds if seconds else None,
        eta_seconds=(wanted - done) * typical if running and wanted and typical else None,
        resume_seconds=statistics.median(resumes) if resumes else None,
    )


def _get_values(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if isinstance(line.get(key), (int, float))]


def summary_to_json(
    facts: RunFacts, summary: RunSummary, findings: Sequence[Finding]
) -> dict[str, Any]:
    """Everything that the page says, without its curves."""
    account = facts.account
    incidents = facts.incidents
    longest = incidents.checkpoints[0].get("seconds") if incidents.checkpoints else None
    return {
        "run": str(facts.records.directory),
        **vars(summary),
        "time": {
            "allocated_rank_seconds": account.allocated,
            "wall_seconds": account.wall,
            "queued_seconds": account.queued,
            "parts_rank_seconds": account.parts,
            "estimated": account.estimated,
        },
        "starts": [_start_to_json(s) for s in facts.starts],
        "incidents": {
            "slow_steps": [vars(s) for s in incidents.slow_steps],
            "skipped_steps": [e.get("step") for e in incidents.skipped_steps],
            "skipped_samples": len(incidents.skipped_samples),
            "gradient_spikes": [spike.step for spike in incidents.gradient_spikes],
            "checkpoint_median_seconds": incidents.checkpoint_median,
            "checkpoint_longest_seconds": to_number(longest) if incidents.checkpoints else None,
            "grace_period_seconds": incidents.grace_period,
            "checkpoints_longer_than_grace_period": len(incidents.late_checkpoints),
            "other_events": [
                {k: v for k, v in event.items() if k != "at"} for event in incidents.other_events
            ],
        },
        "broken_lines": dict(facts.records.broken_lines),
        "findings": [vars(f) for f in findings],
    }


def summary_to_text(facts: RunFacts, summary: RunSummary, findings: Sequence[Finding]) -> str:
    """A screenful for the terminal."""
    reason = f" ({summary.reason})" if summary.reason else ""
    lines = [f"{facts.records.directory}: {summary.status}{reason}", _format_progress(summary)]
    if summary.goodput is not None:
        parts = sorted(facts.account.parts.items(), key=lambda pair: -pair[1])
        losses = "; ".join(
            f"{LABELS[name]} {seconds / facts.account.allocated:.1%}"
            for name, seconds in parts
            if name not in ("progress", "data_wait") and seconds > 0
        )
        lines.append(f"goodput {summary.goodput:.1%}" + (f"  ({losses})" if losses else ""))
    lines += _format_starts(facts.starts)
    lines.append("what to look at first:")
    marks = {"bad": "!!", "warn": " !", "note": "  "}
    lines += [f"  {marks[f.weight]} {f.text}" for f in findings]
    return "\n".join(lines)


def _format_progress(summary: RunSummary) -> str:
    done = format_count(summary.steps_done, "step")
    if summary.steps_wanted:
        done = f"{summary.steps_done}/{format_count(summary.steps_wanted, 'step')}"
    parts = [f"{done} done"]
    if summary.loss is not None:
        parts.append(f"loss {summary.loss:.4f}")
    if summary.tokens_per_second is not None:
        parts.append(f"{summary.tokens_per_second:,.0f} tokens/s")
    if summary.mfu is not None:
        parts.append(f"MFU {summary.mfu:.1%}")
    if summary.data_wait is not None:
        parts.append(f"data wait {summary.data_wait:.1%}")
    if summary.eta_seconds is not None:
        parts.append(f"ETA {format_seconds(summary.eta_seconds)}")
    return "  ".join(parts)


def _format_starts(starts: Sequence[Start]) -> list[str]:
    lines = [f"{format_count(len(starts), 'start')}:"]
    if len(starts) > SHOWN_STARTS:
        lines.append(f"  ... and {len(starts) - SHOWN_STARTS} earlier")
    for start in starts[-SHOWN_STARTS:]:
        steps = (
            "never trained"
            if start.first_step is None
            else f"steps {start.first_step} to {start.steps_done}"
        )
        line = (
            f"  start {start.number}: {format_seconds(start.seconds)} on "
            f"{format_count(start.world_size, 'rank')}, {steps}; {start.status}"
        )
        if start.lost_steps:
            line += f", {format_count(start.lost_steps, 'lost step')}"
        resume = compute_resume_seconds(start)
        if resume is not None:
            line += f", first step after {format_seconds(resume)}"
        lines.append(line)
    return lines


def _start_to_json(start: Start) -> dict[str, Any]:
    return {
        "number": start.number,
        "begin": start.begin,
        "end": start.end,
        "seconds": start.seconds,
        "status": start.status,
        "reason": start.reason,
        "world_size": start.world_size,
        "nodes": start.nodes,
        "node_list": start.node_list,
        "job": start.job,
        "restart": start.restart,
        "first_step": start.first_step,
        "steps_done": start.steps_done,
        "failed_step": start.failed_step,
        "offending_samples": start.offending_samples,
        "lost_steps": start.lost_steps,
        "lost_seconds": start.lost_seconds,
        "startup_seconds": start.startup_seconds,
        "resume_seconds": compute_resume_seconds(start),
        "parts_seconds": split_seconds(start),
    }
