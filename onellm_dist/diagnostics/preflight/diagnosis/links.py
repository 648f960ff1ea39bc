"""Links between nodes that are slow or broken."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from onellm_dist.diagnostics.preflight.diagnosis.fault import Fault
from onellm_dist.diagnostics.preflight.diagnosis.reports import NodeReports
from onellm_dist.diagnostics.preflight.options import PreflightOptions

SLOW_LINK = 1 / 3
"""A link is slow below this share of the nodes' median."""
REMEDY = "check its network card, cable and NCCL/GLOO settings."


def check_links(found: NodeReports, options: PreflightOptions) -> Iterator[Fault]:
    """Check each node's best link: a node that is slow with every partner is itself slow."""
    best = found.get_best_links()
    tried = {
        node
        for node in found.nodes
        if any(report.get("pairs") for report in found.get_reports(node))
    }
    two = len(tried) == 2
    for node in sorted(tried - best.keys()):
        errors = [
            pair["error"]
            for report in found.get_reports(node)
            for pair in report["pairs"]
            if pair.get("error")
        ]
        partners = "its one partner" if two else "any of its partners"
        yield Fault(
            "fail",
            node,
            f"no all-reduce with {partners} succeeded ({errors[0] if errors else 'no answer'})",
            REMEDY,
            exclude=not two,
        )
    for node in best:
        yield from _check_speed(found, node, best, options, two=two)
        yield from _check_pairs(found, node, best)


def _check_speed(
    found: NodeReports,
    node: str,
    best: Mapping[str, float],
    options: PreflightOptions,
    *,
    two: bool,
) -> Iterator[Fault]:
    speed = best[node]
    median = statistics.median(best.values())
    partners = [
        pair["with"]
        for report in found.get_reports(node)
        for pair in report.get("pairs", ())
        if pair.get("speed")
    ]
    text = (
        f"all-reduce at {speed / 1e9:.3g} GB/s with its best partner "
        f"(of {', '.join(dict.fromkeys(partners))})"
    )
    if options.min_bandwidth and speed < options.min_bandwidth * 1e9:
        more = (
            "; of two nodes the slow one cannot be determined: try each with a third" if two else ""
        )
        yield Fault(
            "fail",
            node,
            f"{text}, {options.min_bandwidth:g} required{more}",
            REMEDY,
            exclude=not two,
        )
    elif len(best) > 2 and speed < SLOW_LINK * median:
        yield Fault(
            "fail",
            node,
            f"{text}, the nodes' median is {median / 1e9:.3g}",
            REMEDY,
            exclude=True,
        )


def _check_pairs(found: NodeReports, node: str, best: Mapping[str, float]) -> Iterator[Fault]:
    """A pair that failed although both nodes worked with others, reported for the first of them."""
    for report in found.get_reports(node)[:1]:
        for pair in report.get("pairs", ()):
            other = pair["with"]
            if pair.get("error") and other in best and node < other:
                yield Fault(
                    "fail",
                    "",
                    f"no all-reduce between {node} and {other} ({pair['error']}); both worked "
                    "with other nodes",
                    "check the route between them.",
                )
