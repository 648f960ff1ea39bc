"""All rules in turn, and their findings in order of urgency."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from onellm_dist.report.facts import RunFacts
from onellm_dist.report.findings import efficiency, endings, learning
from onellm_dist.report.findings.finding import Finding

Rule = Callable[[RunFacts], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    endings.check_latest_start,
    endings.check_crash_loops,
    endings.check_bad_nodes,
    endings.check_preflight,
    endings.check_hangs,
    efficiency.check_goodput,
    efficiency.check_lost_steps,
    efficiency.check_data_wait,
    efficiency.check_stragglers,
    learning.check_skipped_samples,
    learning.check_loss,
    learning.check_skipped_steps,
    learning.check_gradients,
    efficiency.check_speed,
    efficiency.check_budgets,
    efficiency.check_checkpoints,
    efficiency.check_resumes,
    learning.check_broken_lines,
    learning.check_experts,
)
ORDER = {"bad": 0, "warn": 1, "note": 2}


def collect_findings(facts: RunFacts) -> list[Finding]:
    """What stands out, the worst first; a single note if nothing does."""
    findings = [finding for rule in RULES for finding in rule(facts)]
    findings.sort(key=lambda finding: ORDER[finding.weight])
    return findings or [Finding("note", "Nothing stands out.")]
