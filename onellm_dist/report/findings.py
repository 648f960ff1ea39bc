"""What to look at first: a few sentences, computed from the run, the most urgent first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from onellm_dist.common.progress import seconds_text
from onellm_dist.report.account import WORDS, Account, resume_seconds
from onellm_dist.report.attempts import Attempt, median, number
from onellm_dist.report.read import Entry, RunFiles
from onellm_dist.report.troubles import SLOW_FACTOR, Troubles

Weight = Literal["bad", "warn", "note"]
FEW = 5
"""Steps from which on rates and medians say something."""
WHY_SKIPPED = {
    "loss_not_finite": "a loss that is not finite",
    "gradient_not_finite": "a gradient that is not finite",
    "loss_spike": "a leap of the loss",
    "gradient_spike": "a leap of the gradient norm",
    "not_finite": "not finite",
}


@dataclass(frozen=True)
class Finding:
    """One sentence for people: what was seen, and what to do."""

    weight: Weight
    text: str


@dataclass(frozen=True)
class Facts:
    """All that the rules look at."""

    files: RunFiles
    attempts: Sequence[Attempt]
    account: Account
    troubles: Troubles


def findings_of(facts: Facts) -> list[Finding]:
    """What stands out, bad things first; a single note where nothing does."""
    found = [finding for rule in RULES for finding in rule(facts)]
    order = {"bad": 0, "warn": 1, "note": 2}
    found.sort(key=lambda f: order[f.weight])
    return found or [Finding("note", "Nothing stands out.")]


def counted(number: int, one: str, many: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number:,} {one if number == 1 else many}"


def span(seconds: float) -> str:
    """Seconds for people, short ones with their fractions."""
    return f"{seconds:.2g} s" if seconds < 10 else seconds_text(seconds)


def _ending(facts: Facts) -> Iterator[Finding]:
    if not facts.attempts:
        yield Finding("warn", "No start is recorded in this directory yet.")
        return
    last = facts.attempts[-1]
    at = f" at step {last.last_step}" if last.last_step is not None else " before its first step"
    if last.status in ("failed", "usage"):
        suspects = (
            f" Suspect samples: {', '.join(last.suspects[:4])}{' …' if len(last.suspects) > 4 else ''}."
            if last.suspects
            else ""
        )
        yield Finding("bad", f"The last start failed{at}: {last.reason}.{suspects}")
    elif last.status == "lost":
        yield Finding(
            "bad",
            f"The last start ended{at} without a word (no exit.json): killed, out of memory, or its node died. See the job's log.",
        )
    elif (
        last.status == "running"
        and facts.files.last_sign is not None
        and facts.troubles.typical > 0
    ):
        quiet = facts.files.now - facts.files.last_sign
        if last.steps and quiet > max(60.0, 10 * facts.troubles.typical):
            yield Finding(
                "bad",
                f"The run is held by a process but has written nothing for {seconds_text(quiet)} "
                f"(a step takes {facts.troubles.typical:.3g} s): it may hang.",
            )


def _crash_loops(facts: Facts) -> Iterator[Finding]:
    failed = [
        a for a in facts.attempts if a.status == "failed" and not a.reason.startswith("preflight")
    ]  # no rank was started then
    places = Counter(a.failed_step if a.failed_step is not None else a.last_step for a in failed)
    for step, times in places.items():
        if times < 2:
            continue
        same = [
            set(a.suspects) for a in failed if step in (a.failed_step, a.last_step) and a.suspects
        ]
        common = sorted(set.intersection(*same)) if len(same) > 1 else []
        where = f"at step {step}" if step is not None else "before the first step"
        yield Finding(
            "bad",
            f"{times} starts failed {where}: the cause is in the data or the code there, not in the cluster."
            + (f" Samples suspected each time: {', '.join(common[:4])}." if common else ""),
        )


def _bad_nodes(facts: Facts) -> Iterator[Finding]:
    """A node that was in at least two starts that broke, in all of the broken ones, and in none that ended well."""
    named = [a for a in facts.attempts if a.node_list]
    broken = [_nodes(a) for a in named if a.status in ("failed", "lost")]
    well = {node for a in named if a.status not in ("failed", "lost") for node in _nodes(a)}
    if len(broken) > 1:
        suspects = sorted(set.intersection(*broken) - well)
        if suspects:
            yield Finding(
                "warn",
                f"{', '.join(suspects)} took part in all {len(broken)} starts that broke and in none that ended well: "
                f"try --exclude={','.join(suspects)}, or onellm doctor --distributed.",
            )


def _preflight(facts: Facts) -> Iterator[Finding]:
    found = facts.files.preflight
    faults = [
        f
        for f in (found or {}).get("faults") or ()
        if isinstance(f, dict) and f.get("state") == "fail"
    ]
    if found is not None and faults:
        words = "; ".join(
            f"{f['node']}: {f.get('what')}" if f.get("node") else str(f.get("what"))
            for f in faults[:3]
        )
        yield Finding(
            "warn",
            f"The last preflight found {counted(len(faults), 'fault', 'faults')}: {words}{' …' if len(faults) > 3 else ''}.",
        )


def _hangs(facts: Facts) -> Iterator[Finding]:
    hosts = Counter(a.suspected_host for a in facts.attempts if a.suspected_host)
    for host, times in hosts.items():
        yield Finding(
            "bad",
            f"The watchdog blamed a rank on {host} for {counted(times, 'hang', 'hangs')}: try --exclude={host}.",
        )


def _nodes(attempt: Attempt) -> set[str]:
    from onellm_dist.common.errors import UsageError
    from onellm_dist.launch.slurm.environment import expand_hosts

    try:
        return set(expand_hosts(attempt.node_list))
    except UsageError:
        return {attempt.node_list}


def _goodput(facts: Facts) -> Iterator[Finding]:
    goodput = facts.account.goodput
    if goodput is None or goodput >= 0.8 or len(facts.files.steps) < FEW:
        return
    losses = {
        name: s for name, s in facts.account.parts.items() if name not in ("progress", "data_wait")
    }
    worst = max(losses, key=lambda name: losses[name])
    share = losses[worst] / facts.account.allocated
    yield Finding(
        "warn" if goodput < 0.5 or facts.account.allocated > 3600 else "note",
        f"Goodput is {goodput:.0%}: the largest loss is {WORDS[worst]}, {share:.0%} of the allocated time.",
    )


def _lost_work(facts: Facts) -> Iterator[Finding]:
    lost = sum(a.lost_steps for a in facts.attempts)
    if not lost:
        return
    seconds = sum(a.lost_seconds for a in facts.attempts)
    every = facts.files.setting("checkpoint", "every")
    text = f"{counted(lost, 'step was', 'steps were')} done in vain ({seconds_text(seconds)}), after the last checkpoint before a restart."
    best = _young(facts)
    if best is not None and isinstance(every, int) and not 0.5 * best <= every <= 2 * best:
        text += f" By Young's formula about checkpoint.every={best} would lose least here (it is {every})."
    yield Finding(
        "warn" if seconds > 0.05 * max(1.0, sum(a.seconds for a in facts.attempts)) else "note",
        text,
    )


def _young(facts: Facts) -> int | None:
    """Steps between checkpoints that lose least: sqrt(2 x a checkpoint's cost x time between failures), J. W. Young, CACM 1974."""
    breaks = [a for a in facts.attempts if a.status in ("failed", "lost")]
    if len(breaks) < 2 or not facts.troubles.checkpoint_median or not facts.troubles.typical:
        return None
    between = sum(a.seconds for a in facts.attempts) / len(breaks)
    return max(
        1, round(math.sqrt(2 * facts.troubles.checkpoint_median * between) / facts.troubles.typical)
    )


def _data(facts: Facts) -> Iterator[Finding]:
    waits = [number(s.get("data_wait_fraction")) for s in facts.files.steps]
    if len(waits) >= FEW and median(waits) > 0.1:
        yield Finding(
            "warn",
            f"Half of the steps spend {median(waits):.0%} or more waiting for data: raise data.workers or data.prefetch, "
            "or give the loader more cores.",
        )
    if facts.files.skipped_samples:
        most = facts.files.setting("data", "max_skipped_samples")
        reasons = Counter(
            str(t.get("reason", "?")).split(":")[0] for t in facts.files.skipped_samples
        )
        text = (
            f"{counted(len(facts.files.skipped_samples), 'sample', 'samples')} could not be read ({reasons.most_common(1)[0][0]}"
            + (" and others" if len(reasons) > 1 else "")
            + ")"
        )
        near = isinstance(most, int) and len(facts.files.skipped_samples) > most / 2
        yield Finding(
            "warn" if near else "note",
            text + (f"; more than {most} stop the run." if isinstance(most, int) else "."),
        )
    padding = [number(s.get("padding_fraction")) for s in facts.files.steps]
    if len(padding) >= FEW and median(padding) > 0.1:
        yield Finding(
            "note",
            f"{median(padding):.0%} of the positions are padding: ranks are dealt nothing in many micro-steps. Use fewer "
            "ranks, a larger data.global_batch, or smaller packs.",
        )


def _loss(facts: Facts) -> Iterator[Finding]:
    losses = [
        (int(s["step"]), number(s.get("loss")))
        for s in facts.files.steps
        if isinstance(s.get("loss"), (int, float))
    ]
    if len(losses) >= 40:
        tenth = len(losses) // 10
        windows = [
            median([loss for _, loss in losses[i : i + tenth]])
            for i in range(0, len(losses) - tenth + 1, tenth)
        ]
        best = min(windows)
        if windows[-1] > 1.2 * best and windows[-1] - best > 0.05:
            step = losses[windows.index(best) * tenth][0]
            yield Finding(
                "bad",
                f"The loss is rising: {windows[-1]:.3f} over the last {tenth} steps, {best:.3f} at its best near step {step}.",
            )
    checked = [
        (int(v["step"]), number(v.get("loss")))
        for v in facts.files.validation
        if isinstance(v.get("loss"), (int, float))
    ]
    if len(checked) >= 3 and checked[-1][1] > 1.05 * min(loss for _, loss in checked):
        step, low = min(checked, key=lambda pair: pair[1])
        yield Finding(
            "warn",
            f"Validation loss was lowest after step {step} ({low:.3f}) and is {checked[-1][1]:.3f} now.",
        )
    skipped = facts.troubles.skipped
    if skipped:
        kinds = Counter(str(event.get("kind", "not_finite")) for event in skipped)
        why = ", ".join(
            f"{WHY_SKIPPED.get(kind, kind)}" + (f" ({n})" if len(kinds) > 1 else "")
            for kind, n in kinds.most_common()
        )
        yield Finding(
            "warn",
            f"{counted(len(skipped), 'step was', 'steps were')} skipped: {why}{_most_blamed(skipped)} "
            f"(the last: step {skipped[-1].get('step')}); events.jsonl names the samples.",
        )
    if facts.troubles.spikes:
        step, norm, before = max(facts.troubles.spikes, key=lambda s: s[1] / s[2])
        count = counted(len(facts.troubles.spikes), "gradient norm is", "gradient norms are")
        yield Finding(
            "note",
            f"{count} far above those before; the worst, at step {step}: "
            f"{norm:.3g} after {before:.3g}.",
        )
    clip = facts.files.setting("optim", "grad_clip")
    norms = [
        number(s.get("grad_norm"))
        for s in facts.files.steps[len(facts.files.steps) // 10 :]
        if s.get("grad_norm") is not None
    ]
    if isinstance(clip, (int, float)) and clip > 0 and len(norms) >= 40:
        share = sum(norm > clip for norm in norms) / len(norms)
        if share > 0.5:
            yield Finding(
                "note",
                f"{share:.0%} of the gradients are clipped (optim.grad_clip={clip:g}): the rate in effect is lower than optim.lr.",
            )


def _most_blamed(skipped: Sequence[Entry]) -> str:
    """The modality that every skipped step has among its suspects, where there is one: it may never be trained on."""
    suspects = [
        {str(s.get("modality")) for s in event.get("samples") or () if isinstance(s, dict)}
        for event in skipped
    ]
    common = set.intersection(*suspects)
    return (
        f", each time with suspects of {' and of '.join(sorted(common))}"
        if common and len(skipped) > 1
        else ""
    )


def _speed(facts: Facts) -> Iterator[Finding]:
    troubles, steps = facts.troubles, facts.files.steps
    total = sum(number(s.get("seconds")) for s in steps)
    if troubles.slow and total and troubles.slow_excess > 0.02 * total:
        waiting = sum(s.waited > 0.5 for s in troubles.slow)
        why = f", {waiting} of them waiting for data" if waiting else ""
        yield Finding(
            "warn",
            f"{counted(len(troubles.slow), 'step', 'steps')} took more than {SLOW_FACTOR:g} medians{why}: "
            f"{seconds_text(troubles.slow_excess)} over the median in all; the worst, step "
            f"{troubles.slow[0].step}, took {troubles.slow[0].seconds:.3g} s.",
        )
    for attempt in facts.attempts[-1:]:
        rates = [number(s.get("tokens_per_second")) for s in attempt.steps[1:]]
        if len(rates) >= 50:
            fifth = len(rates) // 5
            parts = [median(rates[i : i + fifth]) for i in range(0, len(rates) - fifth + 1, fifth)]
            if parts[-1] < 0.8 * max(parts):
                yield Finding(
                    "warn",
                    f"Throughput fell to {parts[-1]:,.0f} tokens/s from {max(parts):,.0f} within the last start.",
                )
    mfu = [number(s["mfu"]) for s in steps if s.get("mfu") is not None]
    if len(mfu) >= FEW and median(mfu) < 0.2:
        yield Finding(
            "note",
            f"MFU is {median(mfu):.0%}: larger packs (data.pack_llm_tokens, data.pack_encoder_tokens) may use the GPUs better.",
        )


def _checkpoints(facts: Facts) -> Iterator[Finding]:
    troubles = facts.troubles
    if troubles.late:
        worst, grace = number(troubles.late[0].get("seconds")), troubles.grace_period or 0.0
        yield Finding(
            "bad",
            f"{len(troubles.late)} of {len(troubles.checkpoints)} checkpoints took longer than the "
            f"job's grace period of {span(grace)} (the longest {span(worst)}): a preemption would lose work. "
            "Raise it (onellm launch --grace-period).",
        )
    share = (
        facts.account.parts["checkpoints"] / facts.account.allocated
        if facts.account.allocated
        else 0.0
    )
    if share > 0.05 and len(facts.files.steps) >= FEW:
        yield Finding(
            "warn",
            f"{share:.0%} of the allocated time went into standing still for checkpoints: raise checkpoint.every, or use a faster disk.",
        )
    long = number(troubles.checkpoints[0].get("seconds")) if troubles.checkpoints else 0.0
    if (
        len(troubles.checkpoints) >= 3
        and long > 10
        and long > SLOW_FACTOR * troubles.checkpoint_median
    ):
        yield Finding(
            "note",
            f"One checkpoint took {long:.0f} s, the median is {troubles.checkpoint_median:.1f} s: the file system stalled.",
        )


def _resumes(facts: Facts) -> Iterator[Finding]:
    times = [(seconds, a) for a in facts.attempts[1:] if (seconds := resume_seconds(a)) is not None]
    if times:
        seconds, attempt = max(times, key=lambda pair: pair[0])
        phase = max(attempt.phases, key=lambda name: attempt.phases[name])
        if seconds > 120:
            yield Finding(
                "note",
                f"Coming back took {seconds_text(median([s for s, _ in times]))} (median of {len(times)}); in the "
                f"longest, {phase.replace('_', ' ')} took {seconds_text(attempt.phases[phase])}.",
            )
    worlds = {a.world for a in facts.attempts if a.first_step is not None}
    if len(worlds) > 1:
        yield Finding(
            "note",
            f"The number of ranks changed between starts ({', '.join(map(str, sorted(worlds)))}): compare throughput a rank.",
        )


def _records(facts: Facts) -> Iterator[Finding]:
    if facts.files.broken_lines:
        files = ", ".join(f"{name} ({count})" for name, count in facts.files.broken_lines.items())
        yield Finding(
            "note",
            f"Lines that cannot be read were passed over: {files}. A kill leaves half a line; more of them mean a sick disk.",
        )
    experts = _closed_experts(facts.files.steps)
    if experts:
        yield Finding(
            "warn",
            f"Experts that get less than 2% of the routing weight: {', '.join(experts[:4])}.",
        )


def _closed_experts(steps: Sequence[Entry]) -> list[str]:
    load: Entry = next(
        (s["router_load"] for s in reversed(steps) if isinstance(s.get("router_load"), dict)), {}
    )
    return [
        f"expert {e + 1} for {name}"
        for name, row in load.items()
        if isinstance(row, list)
        for e, w in enumerate(row)
        if number(w) < 0.02
    ]


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _ending,
    _crash_loops,
    _bad_nodes,
    _preflight,
    _hangs,
    _goodput,
    _lost_work,
    _data,
    _loss,
    _speed,
    _checkpoints,
    _resumes,
    _records,
)
