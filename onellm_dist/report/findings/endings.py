"""Findings about how starts ended: failures, crash loops, bad nodes, hangs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.progress import format_seconds
from onellm_dist.launch.slurm.environment import expand_hosts
from onellm_dist.report.facts import RunFacts
from onellm_dist.report.findings.finding import Finding
from onellm_dist.report.lost_work import BROKEN
from onellm_dist.report.starts import Start


def check_latest_start(facts: RunFacts) -> Iterator[Finding]:
    """How the latest start ended, or whether it hangs."""
    if not facts.starts:
        yield Finding("warn", "No start is recorded in this directory yet.")
        return
    last = facts.starts[-1]
    where = " before its first step"
    if last.steps_done is not None:
        where = f" after {format_count(last.steps_done, 'step')}"
    if last.status in ("failed", "usage"):
        samples = ""
        if last.offending_samples:
            more = " …" if len(last.offending_samples) > 4 else ""
            samples = f" Offending samples: {', '.join(last.offending_samples[:4])}{more}."
        yield Finding("bad", f"The last start failed{where}: {last.reason}.{samples}")
    elif last.status == "lost":
        yield Finding(
            "bad",
            f"The last start ended{where} without a record (no exit.json): it was killed, ran out "
            "of memory, or its node died. See the job's log.",
        )
    elif last.status == "running":
        yield from _check_silence(facts, last)


def _check_silence(facts: RunFacts, last: Start) -> Iterator[Finding]:
    typical = facts.incidents.typical_seconds
    if facts.records.last_write is None or typical <= 0 or not last.steps:
        return
    quiet = facts.records.now - facts.records.last_write
    if quiet > max(60.0, 10 * typical):
        yield Finding(
            "bad",
            f"A process holds the run but has written nothing for {format_seconds(quiet)} "
            f"(a step takes {typical:.3g} s): it may hang.",
        )


def check_crash_loops(facts: RunFacts) -> Iterator[Finding]:
    """Two or more starts that failed at the same step."""
    # A start that the preflight refused has started no rank.
    failed = [
        s for s in facts.starts if s.status == "failed" and not s.reason.startswith("preflight")
    ]
    counts = Counter(s.steps_done if s.failed_step is None else s.failed_step for s in failed)
    for step, count in counts.items():
        if count < 2:
            continue
        samples = [
            set(s.offending_samples)
            for s in failed
            if step in (s.failed_step, s.steps_done) and s.offending_samples
        ]
        common = sorted(set.intersection(*samples)) if len(samples) > 1 else []
        where = "before the first step" if step is None else f"at step {step}"
        yield Finding(
            "bad",
            f"{count} starts failed {where}: the cause is in the data or the code there, not in "
            "the cluster."
            + (f" Offending samples each time: {', '.join(common[:4])}." if common else ""),
        )


def check_bad_nodes(facts: RunFacts) -> Iterator[Finding]:
    """Nodes that were in every start that broke (two at least), and in none that ended well."""
    named = [s for s in facts.starts if s.node_list]
    broken = [_get_nodes(s) for s in named if s.status in BROKEN]
    good = {node for s in named if s.status not in BROKEN for node in _get_nodes(s)}
    if len(broken) < 2:
        return
    nodes = ",".join(sorted(set.intersection(*broken) - good))
    if nodes:
        yield Finding(
            "warn",
            f"{nodes.replace(',', ', ')} took part in all {len(broken)} starts that broke and in "
            f"none that ended well: try --exclude={nodes}, or onellm doctor --distributed.",
        )


def check_preflight(facts: RunFacts) -> Iterator[Finding]:
    """Faults that the last preflight found."""
    result = facts.records.preflight or {}
    faults = [
        fault
        for fault in result.get("faults") or ()
        if isinstance(fault, dict) and fault.get("state") == "fail"
    ]
    if faults:
        texts = "; ".join(
            f"{fault['node']}: {fault.get('what')}" if fault.get("node") else str(fault.get("what"))
            for fault in faults[:3]
        )
        more = " …" if len(faults) > 3 else ""
        count = format_count(len(faults), "fault")
        yield Finding("warn", f"The last preflight found {count}: {texts}{more}.")


def check_hangs(facts: RunFacts) -> Iterator[Finding]:
    """Hosts that the watchdog holds responsible for hangs."""
    hosts = Counter(s.responsible_host for s in facts.starts if s.responsible_host)
    for host, count in hosts.items():
        yield Finding(
            "bad",
            f"The watchdog attributes {format_count(count, 'hang')} to a rank on {host}: "
            f"try --exclude={host}.",
        )


def _get_nodes(start: Start) -> set[str]:
    try:
        return set(expand_hosts(start.node_list))
    except UsageError:
        return {start.node_list}
