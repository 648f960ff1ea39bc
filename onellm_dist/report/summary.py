"""A run in figures, for the top of the page, the terminal and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onellm_dist.common.progress import seconds_text
from onellm_dist.report.account import WORDS, resume_seconds, split
from onellm_dist.report.attempts import Attempt, median, number
from onellm_dist.report.findings import Facts, Finding, counted

RECENT = 20
"""Steps at most that the current loss and rate are taken from; for the loss, a tenth of a short run's steps."""


@dataclass(frozen=True)
class Summary:
    """The figures that people ask for first; None where the run has not recorded them."""

    status: str
    reason: str
    steps_done: int
    steps_wanted: int | None
    loss: float | None
    """Mean of the last steps."""
    goodput: float | None
    starts: int
    lost_steps: int
    tokens_per_second: float | None
    """Median of the last start's last steps."""
    mfu: float | None
    """Median."""
    data_wait: float | None
    """Share of all steps' time."""
    eta_seconds: float | None
    """Only while it runs."""
    resume_seconds: float | None
    """Median over the restarts, from the end of the start before to the first new step."""


def summary_of(facts: Facts) -> Summary:
    """Computes them."""
    files, attempts = facts.files, facts.attempts
    last = attempts[-1] if attempts else None
    steps = files.steps
    lately = max(1, min(RECENT, len(steps) // 10))
    recent = [float(s["loss"]) for s in steps[-lately:] if isinstance(s.get("loss"), (int, float))]
    rates = [
        float(s["tokens_per_second"])
        for s in (last.steps if last else steps)[-RECENT:]
        if s.get("tokens_per_second") is not None
    ]
    mfu = [float(s["mfu"]) for s in steps if s.get("mfu") is not None]
    seconds = sum(number(s.get("seconds")) for s in steps)
    waited = sum(number(s.get("seconds")) * number(s.get("data_wait_fraction")) for s in steps)
    done = int(steps[-1]["step"]) + 1 if steps else int(last.first_step or 0) if last else 0
    wanted = files.setting("train", "steps")
    wanted = wanted if isinstance(wanted, int) else None
    running = last is not None and last.status == "running"
    back = [s for a in attempts[1:] if (s := resume_seconds(a)) is not None]
    return Summary(
        status=last.status if last else "none",
        reason=last.reason if last else "no start is recorded",
        steps_done=done,
        steps_wanted=wanted,
        loss=sum(recent) / len(recent) if recent else None,
        goodput=facts.account.goodput,
        starts=len(attempts),
        lost_steps=sum(a.lost_steps for a in attempts),
        tokens_per_second=median(rates) if rates else None,
        mfu=median(mfu) if mfu else None,
        data_wait=waited / seconds if seconds else None,
        eta_seconds=(wanted - done) * facts.troubles.typical
        if running and wanted and facts.troubles.typical
        else None,
        resume_seconds=median(back) if back else None,
    )


def summary_json(facts: Facts, summary: Summary, findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything the page says, without its curves."""
    account, troubles = facts.account, facts.troubles
    return {
        "run": str(facts.files.directory),
        **vars(summary),
        "time": {
            "allocated_rank_seconds": account.allocated,
            "wall_seconds": account.wall,
            "queued_seconds": account.queued,
            "parts_rank_seconds": account.parts,
            "estimated": account.estimated,
        },
        "attempts": [_attempt_json(a) for a in facts.attempts],
        "troubles": {
            "slow_steps": [vars(s) for s in troubles.slow],
            "skipped_steps": [e.get("step") for e in troubles.skipped],
            "skipped_samples": len(troubles.skipped_samples),
            "gradient_spikes": [step for step, _, _ in troubles.spikes],
            "checkpoint_median_seconds": troubles.checkpoint_median,
            "checkpoint_longest_seconds": number(troubles.checkpoints[0].get("seconds"))
            if troubles.checkpoints
            else None,
            "grace_period_seconds": troubles.grace_period,
            "checkpoints_longer_than_grace_period": len(troubles.late),
            "other_events": [{k: v for k, v in e.items() if k != "at"} for e in troubles.others],
        },
        "broken_lines": dict(facts.files.broken_lines),
        "findings": [vars(f) for f in findings],
    }


def summary_text(facts: Facts, summary: Summary, findings: Sequence[Finding]) -> str:
    """A screenful for the terminal."""
    of = f"/{summary.steps_wanted}" if summary.steps_wanted else ""
    lines = [
        f"{facts.files.directory}: {summary.status}"
        + (f" ({summary.reason})" if summary.reason else "")
    ]
    first = [f"step {summary.steps_done}{of}"]
    if summary.loss is not None:
        first.append(f"loss {summary.loss:.4f}")
    if summary.tokens_per_second is not None:
        first.append(f"{summary.tokens_per_second:,.0f} tokens/s")
    if summary.mfu is not None:
        first.append(f"MFU {summary.mfu:.1%}")
    if summary.data_wait is not None:
        first.append(f"data wait {summary.data_wait:.1%}")
    if summary.eta_seconds is not None:
        first.append(f"ETA {seconds_text(summary.eta_seconds)}")
    lines.append("  ".join(first))
    if summary.goodput is not None:
        parts = sorted(facts.account.parts.items(), key=lambda pair: -pair[1])
        losses = [
            f"{WORDS[name]} {s / facts.account.allocated:.1%}"
            for name, s in parts
            if name not in ("progress", "data_wait") and s > 0
        ]
        lines.append(
            f"goodput {summary.goodput:.1%}" + (f"  ({'; '.join(losses)})" if losses else "")
        )
    lines += _starts_text(facts.attempts)
    lines.append("what to look at first:")
    marks = {"bad": "!!", "warn": " !", "note": "  "}
    lines += [f"  {marks[f.weight]} {f.text}" for f in findings]
    return "\n".join(lines)


def _starts_text(attempts: Sequence[Attempt]) -> list[str]:
    shown = [
        f"  start {a.number}: {seconds_text(a.seconds)} on {counted(a.world, 'rank', 'ranks')}, {_steps_text(a)}; {a.status}"
        + (f", {a.lost_steps} steps in vain" if a.lost_steps else "")
        + (
            f", first step after {seconds_text(seconds)}"
            if (seconds := resume_seconds(a)) is not None
            else ""
        )
        for a in attempts[-8:]
    ]
    more = [f"  ... and {len(attempts) - 8} before"] if len(attempts) > 8 else []
    return [f"{len(attempts)} start{'s' if len(attempts) != 1 else ''}:", *more, *shown]


def _steps_text(attempt: Attempt) -> str:
    return (
        "never trained"
        if attempt.first_step is None
        else f"steps {attempt.first_step} to {attempt.last_step}"
    )


def _attempt_json(a: Attempt) -> dict[str, Any]:
    return {
        "number": a.number,
        "begin": a.begin,
        "end": a.end,
        "seconds": a.seconds,
        "status": a.status,
        "reason": a.reason,
        "world": a.world,
        "nodes": a.nodes,
        "node_list": a.node_list,
        "job": a.job,
        "restart": a.restart,
        "first_step": a.first_step,
        "last_step": a.last_step,
        "failed_step": a.failed_step,
        "suspects": a.suspects,
        "lost_steps": a.lost_steps,
        "lost_seconds": a.lost_seconds,
        "phases": a.phases,
        "resume_seconds": resume_seconds(a),
        "parts_seconds": split(a),
    }
