"""Names ranks and nodes that keep the others waiting, and says with what: data or computing."""

from __future__ import annotations

import socket
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.metrics import StepMetrics

WINDOW = 8
"""Measurements over which medians are taken."""
FEWEST = 4
"""Measurements before a rank is named."""
SHARE = 0.1
"""A rank is slow if it takes this share of a step longer than the median of the others."""
FACTOR = 1.15
"""A slow rank also takes this many times as long: packs of the ranks are not equally large."""
WORDS = {
    "data": ("waits for its loader", "look at its disk or network, data.workers and the CPU cores"),
    "compute": ("computes", "look at the clocks and temperature of its GPU, and at its node"),
    "host": ("runs Python between its passes", "look at callbacks and other processes of its node"),
}
"""Kind of time to what a slow rank does, and what to do."""


class Straggler(NamedTuple):
    """A rank, or all ranks of a node, that take longer than the others."""

    kind: str
    ranks: tuple[int, ...]
    excess: float
    """Seconds in a step beyond the median of the other ranks."""


class StragglerDetector:
    """Finds stragglers in the times of all ranks.

    Args:
        nodes: the node of each rank.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = nodes
        self._seconds: dict[str, deque[Sequence[float]]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._named: set[tuple[str, int]] = set()

    def update(
        self, seconds: Mapping[str, Sequence[float]], step_seconds: float
    ) -> list[Straggler]:
        """Add a measured step.

        Args:
            seconds: kind to the seconds of each rank.
            step_seconds: duration of the step.

        Returns:
            Those that are found to be slow now; each is returned once until it recovers.
        """
        self._steps.append(step_seconds)
        for kind, values in seconds.items():
            self._seconds[kind].append(values)
        if len(self._steps) < FEWEST or len(self._nodes) < 2:
            return []
        typical = statistics.median(self._steps)
        return [found for kind in WORDS for found in self._check(kind, typical)]

    def _check(self, kind: str, step_seconds: float) -> list[Straggler]:
        measured = self._seconds[kind]
        if not measured:
            return []
        medians = [statistics.median(own) for own in zip(*measured, strict=True)]
        excess: dict[int, float] = {}
        for rank, own in enumerate(medians):
            others = statistics.median([*medians[:rank], *medians[rank + 1 :]])
            beyond = own - others
            is_named = (kind, rank) in self._named
            # One that was named stays so until it is clearly no longer slow.
            share = SHARE / 2 if is_named else SHARE
            if beyond > share * step_seconds and own > FACTOR * others:
                excess[rank] = beyond
            else:
                self._named.discard((kind, rank))
        new = {rank: s for rank, s in excess.items() if (kind, rank) not in self._named}
        self._named |= {(kind, rank) for rank in new}
        return self._join_nodes(kind, new)

    def _join_nodes(self, kind: str, excess: Mapping[int, float]) -> list[Straggler]:
        """All ranks of a node that are slow together are one straggler."""
        by_node: dict[str, list[int]] = defaultdict(list)
        for rank in excess:
            by_node[self._nodes[rank]].append(rank)
        found = []
        for node, ranks in by_node.items():
            is_whole = len(ranks) == self._nodes.count(node)
            groups = [tuple(ranks)] if is_whole else [(rank,) for rank in ranks]
            found += [
                Straggler(kind, group, statistics.median(excess[r] for r in group))
                for group in groups
            ]
        return found


class Stragglers(Callback):
    """Writes an event about each straggler.

    Args:
        dist: the ranks.
        events: where they are recorded.
    """

    def __init__(self, dist: Distributed, events: Events) -> None:
        self._dist = dist
        self._events = events
        self._nodes: list[str] = []
        self._detector = StragglerDetector([])

    def on_fit_start(self) -> None:
        self._nodes = self._dist.gather(socket.gethostname())
        self._detector = StragglerDetector(self._nodes)

    def on_metrics(self, metrics: StepMetrics) -> None:
        if not self._dist.is_rank_zero or not metrics.rank_seconds:
            return
        for found in self._detector.update(metrics.rank_seconds, metrics.seconds):
            self._write(metrics, found)

    def _write(self, metrics: StepMetrics, found: Straggler) -> None:
        node, ranks = self._nodes[found.ranks[0]], ", ".join(map(str, found.ranks))
        what, remedy = WORDS[found.kind]
        share = found.excess / metrics.seconds
        self._events.write(
            "straggler",
            step=metrics.step,
            kind=found.kind,
            ranks=list(found.ranks),
            node=node,
            seconds=round(found.excess, 4),
            share=round(share, 4),
            message=f"rank{'s' if len(found.ranks) > 1 else ''} {ranks} on {node} {what} "
            f"{found.excess:.2g} s a step longer than the other ranks, which wait "
            f"({share:.0%} of a step): {remedy}",
            warning=True,
        )
