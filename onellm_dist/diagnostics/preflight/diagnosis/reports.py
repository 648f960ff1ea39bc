"""What the ranks of a preflight reported, by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NodeReports:
    """Everything that the ranks reported."""

    nodes: Mapping[str, Sequence[int]]
    """Node -> its ranks as far as known, including those that never joined."""
    reports: Mapping[int, Mapping[str, Any]]
    """Rank -> its report."""
    missing: Mapping[int, str]
    """Rank that never joined -> its node, "" if unknown."""
    left_behind: Mapping[int, str] = field(default_factory=dict)
    """Rank that joined and then stopped answering -> the phase."""
    skews: Mapping[str, float] = field(default_factory=dict)
    """Node -> seconds by which its clock is ahead of the nodes' median."""
    needs: Mapping[str, int] | None = None
    """Bytes that the recipe needs (fields of `ResourceNeeds`); None without a recipe."""

    def get_reports(self, node: str) -> list[Mapping[str, Any]]:
        """The reports of a node's ranks."""
        return [self.reports[rank] for rank in self.nodes[node] if rank in self.reports]

    def get_first(self, node: str, key: str) -> Any:
        """The value that the first rank of the node reports for the key, or None."""
        return next((r[key] for r in self.get_reports(node) if r.get(key) is not None), None)

    def get_best_links(self) -> dict[str, float]:
        """Node -> bytes/s of an all-reduce with its best partner."""
        best: dict[str, float] = {}
        for node in self.nodes:
            speeds = [
                pair["speed"]
                for report in self.get_reports(node)
                for pair in report.get("pairs", ())
                if pair.get("speed")
            ]
            if speeds:
                best[node] = max(speeds)
        return best
