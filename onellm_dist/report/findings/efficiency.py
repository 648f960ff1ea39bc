"""Findings about time: goodput, lost work, waiting, speed, checkpoints, resumes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from onellm_dist.common.counts import format_count
from onellm_dist.common.progress import format_seconds
from onellm_dist.report.entries import to_number
from onellm_dist.report.facts import RunFacts
from onellm_dist.report.findings.finding import MIN_STEPS, Finding
from onellm_dist.report.incidents import SLOW_FACTOR
from onellm_dist.report.starts import compute_resume_seconds
from onellm_dist.report.time_account import LABELS
from onellm_dist.report.wording import format_duration

STRAGGLERS = {
    "data": "it waits for its loader (disk, network or CPU cores of that node)",
    "compute": "it computes slowly (clocks and temperature of its GPU)",
    "host": "Python between its passes is slow (callbacks, other processes)",
}


def check_goodput(facts: RunFacts) -> Iterator[Finding]:
    """A low goodput, and what costs most."""
    goodput = facts.account.goodput
    if goodput is None or goodput >= 0.8 or len(facts.records.steps) < MIN_STEPS:
        return
    losses = {
        name: seconds
        for name, seconds in facts.account.parts.items()
        if name not in ("progress", "data_wait")
    }
    worst = max(losses, key=lambda name: losses[name])
    share = losses[worst] / facts.account.allocated
    yield Finding(
        "warn" if goodput < 0.5 or facts.account.allocated > 3600 else "note",
        f"Goodput is {goodput:.0%}: the largest loss is {LABELS[worst]}, "
        f"{share:.0%} of the allocated time.",
    )


def check_lost_steps(facts: RunFacts) -> Iterator[Finding]:
    """Steps that had to be repeated, and a better checkpoint interval."""
    lost = sum(s.lost_steps for s in facts.starts)
    if not lost:
        return
    seconds = sum(s.lost_seconds for s in facts.starts)
    every = facts.records.get_setting("checkpoint", "every")
    text = (
        f"{format_count(lost, 'step was', 'steps were')} lost ({format_seconds(seconds)}): done "
        "after the last checkpoint before a restart or a rollback."
    )
    best = _compute_best_interval(facts)
    if best is not None and isinstance(every, int) and not 0.5 * best <= every <= 2 * best:
        text += (
            f" By Young's formula about checkpoint.every={best} would lose least here "
            f"(it is {every})."
        )
    large = seconds > 0.05 * max(1.0, sum(s.seconds for s in facts.starts))
    yield Finding("warn" if large else "note", text)


def _compute_best_interval(facts: RunFacts) -> int | None:
    """Steps between checkpoints that lose the least time; None with fewer than two failures.

    sqrt(2 x cost of a checkpoint x time between failures): J. W. Young, CACM 1974.
    """
    incidents = facts.incidents
    failures = [s for s in facts.starts if s.status in ("failed", "lost")]
    if len(failures) < 2 or not incidents.checkpoint_median or not incidents.typical_seconds:
        return None
    between = sum(s.seconds for s in facts.starts) / len(failures)
    seconds = math.sqrt(2 * incidents.checkpoint_median * between)
    return max(1, round(seconds / incidents.typical_seconds))


def check_data_wait(facts: RunFacts) -> Iterator[Finding]:
    """Steps that wait for data, and padding."""
    steps = facts.records.steps
    if len(steps) < MIN_STEPS:
        return
    wait = statistics.median(to_number(line.get("data_wait_fraction")) for line in steps)
    if wait > 0.1:
        yield Finding(
            "warn",
            f"Half of the steps spend {wait:.0%} or more of their time waiting for data: raise "
            "data.workers or data.prefetch, or give the loader more cores.",
        )
    padding = statistics.median(to_number(line.get("padding_fraction")) for line in steps)
    if padding > 0.1:
        yield Finding(
            "note",
            f"{padding:.0%} of the positions are padding: many micro-batches are empty on some "
            "ranks. Use fewer ranks, a larger data.global_batch, or smaller packs.",
        )


def check_stragglers(facts: RunFacts) -> Iterator[Finding]:
    """Ranks that kept the others waiting, by node and kind; the latest word about each."""
    latest = {
        (str(event.get("node")), str(event.get("kind")), str(event.get("ranks"))): event
        for event in facts.records.select_events("straggler")
    }
    for (node, kind, _), event in sorted(latest.items()):
        ranks = event.get("ranks")
        named = ", ".join(map(str, ranks)) if isinstance(ranks, list) else "unknown"
        share, what = to_number(event.get("share")), STRAGGLERS.get(kind, kind)
        yield Finding(
            "warn",
            f"Rank {named} on {node} kept the others waiting for {share:.0%} of a step, from step "
            f"{event.get('step')} on: {what}.",
        )


def check_speed(facts: RunFacts) -> Iterator[Finding]:
    """Slow steps, a falling rate, a low MFU."""
    incidents = facts.incidents
    steps = facts.records.steps
    total = sum(to_number(line.get("seconds")) for line in steps)
    if incidents.slow_steps and total and incidents.slow_excess > 0.02 * total:
        waiting = sum(s.waited > 0.5 for s in incidents.slow_steps)
        why = f", {waiting} of them waiting for data" if waiting else ""
        worst = incidents.slow_steps[0]
        yield Finding(
            "warn",
            f"{format_count(len(incidents.slow_steps), 'step')} took more than {SLOW_FACTOR:g} "
            f"medians{why}: {format_seconds(incidents.slow_excess)} above the median in all; the "
            f"worst, step {worst.step}, took {worst.seconds:.3g} s.",
        )
    for start in facts.starts[-1:]:
        rates = [to_number(line.get("tokens_per_second")) for line in start.steps[1:]]
        fifth = len(rates) // 5
        if len(rates) < 50:
            continue
        parts = [
            statistics.median(rates[i : i + fifth]) for i in range(0, len(rates) - fifth + 1, fifth)
        ]
        if parts[-1] < 0.8 * max(parts):
            yield Finding(
                "warn",
                f"Throughput fell from {max(parts):,.0f} to {parts[-1]:,.0f} tokens/s within the "
                "last start.",
            )
    mfu = [to_number(line["mfu"]) for line in steps if line.get("mfu") is not None]
    if len(mfu) >= MIN_STEPS and statistics.median(mfu) < 0.2:
        yield Finding(
            "note",
            f"MFU is {statistics.median(mfu):.0%}: larger packs (data.pack_llm_tokens, "
            "data.pack_encoder_tokens) may use the GPUs better.",
        )


def check_budgets(facts: RunFacts) -> Iterator[Finding]:
    """An out-of-memory lowered the token budgets."""
    lowered = facts.records.select_events("budget_lowered")
    if not lowered:
        return
    last = lowered[-1]
    times = "once" if len(lowered) == 1 else f"{len(lowered)} times"
    yield Finding(
        "warn",
        f"Out of memory lowered the token budgets {times}, last in step {last.get('step', '?')} on "
        f"rank {last.get('rank', '?')}: to {last.get('llm_tokens', '?')} (LLM) and "
        f"{last.get('encoder_tokens', '?')} (encoder). The samples and losses are the same; "
        "measure the device (onellm plan --calibrate) so that the planner finds budgets that fit.",
    )


def check_checkpoints(facts: RunFacts) -> Iterator[Finding]:
    """Checkpoints that take too long for the grace period, too much time, or a stalled disk."""
    incidents = facts.incidents
    late = incidents.late_checkpoints
    if late:
        longest = to_number(late[0].get("seconds"))
        yield Finding(
            "bad",
            f"{len(late)} of {format_count(len(incidents.checkpoints), 'checkpoint')} took longer "
            f"than the grace period of {format_duration(incidents.grace_period or 0.0)} (the "
            f"longest {format_duration(longest)}): a preemption would lose work. Ask for a longer "
            "one (onellm launch --grace-period).",
        )
    allocated = facts.account.allocated
    share = facts.account.parts["checkpoints"] / allocated if allocated else 0.0
    if share > 0.05 and len(facts.records.steps) >= MIN_STEPS:
        yield Finding(
            "warn",
            f"Training paused for checkpoints during {share:.0%} of the allocated time: raise "
            "checkpoint.every, or use a faster disk.",
        )
    if len(incidents.checkpoints) < 3:
        return
    longest = to_number(incidents.checkpoints[0].get("seconds"))
    if longest > 10 and longest > SLOW_FACTOR * incidents.checkpoint_median:
        yield Finding(
            "note",
            f"One checkpoint took {longest:.0f} s, the median is "
            f"{incidents.checkpoint_median:.1f} s: the file system stalled.",
        )


def check_resumes(facts: RunFacts) -> Iterator[Finding]:
    """Slow resumes, and a changed number of ranks."""
    resumes = [
        (seconds, start)
        for start in facts.starts[1:]
        if (seconds := compute_resume_seconds(start)) is not None
    ]
    if resumes:
        longest, start = max(resumes, key=lambda pair: pair[0])
        part, seconds = max(start.startup_seconds.items(), key=lambda item: item[1])
        if longest > 120:
            median = statistics.median(seconds for seconds, _ in resumes)
            yield Finding(
                "note",
                f"Resuming took {format_seconds(median)} (median of {len(resumes)}); in the "
                f"longest resume, {part.replace('_', ' ')} took {format_seconds(seconds)}.",
            )
    sizes = {s.world_size for s in facts.starts if s.first_step is not None}
    if len(sizes) > 1:
        yield Finding(
            "note",
            f"The number of ranks changed between starts ({', '.join(map(str, sorted(sizes)))}): "
            "compare throughput per rank.",
        )
