"""Ranks that never joined, stopped answering, or reported an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onellm_dist.diagnostics.preflight.diagnosis.fault import Fault
from onellm_dist.diagnostics.preflight.diagnosis.reports import NodeReports
from onellm_dist.diagnostics.preflight.options import ALL


def check_attendance(found: NodeReports) -> Iterator[Fault]:
    """Ranks that never joined or stopped answering."""
    for node, ranks in _group_by_node(found.missing).items():
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        if node:
            yield Fault(
                "fail",
                node,
                f"{who} never joined",
                "check that the node is up and its job step started; its log says more.",
                exclude=True,
            )
        else:
            yield Fault(
                "fail",
                "",
                f"{who} never joined, and nothing says on which node they were to run",
                "see the launcher's log.",
            )
    for rank, phase in found.left_behind.items():
        yield Fault(
            "fail",
            next((node for node, ranks in found.nodes.items() if rank in ranks), ""),
            f"rank {rank} stopped answering in phase {phase}",
            "the node or its process died, or it is stuck there.",
            exclude=True,
        )


def _group_by_node(ranks: Mapping[int, str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for rank, node in sorted(ranks.items()):
        groups.setdefault(node, []).append(rank)
    return groups


def check_errors(found: NodeReports) -> Iterator[Fault]:
    """Phases that raised an error or took too long.

    Links between two nodes are diagnosed separately, because two nodes share each of them.
    """
    common: dict[str, list[int]] = {}
    for node in found.nodes:
        for report in found.get_reports(node):
            for phase, text in report.get("errors", {}).items():
                if phase == ALL:
                    common.setdefault(text, []).append(report["rank"])
                    continue
                yield Fault(
                    "fail",
                    node,
                    f"rank {report['rank']}: {phase}: {text}",
                    "see the message; other nodes passed this check.",
                    exclude=True,
                )
    for text, ranks in common.items():
        who = f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
        yield Fault(
            "fail",
            "",
            f"{who}: {ALL}: {text}",
            "pairs of nodes could communicate: check the routes between all of them, and the "
            "NCCL and GLOO settings.",
        )
