"""Which ranks take part in a preflight, and on which nodes they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onellm_dist.diagnostics.preflight.options import PreflightOptions
from onellm_dist.diagnostics.preflight.rendezvous import GRACE_S, Rendezvous
from onellm_dist.launch.ranks import Ranks


@dataclass
class Roster:
    """Who takes part. Ranks that fall behind leave it."""

    nodes: dict[str, list[int]]
    """Node -> its ranks that joined, in rank order."""
    present: list[int]
    fit: list[int]
    """Of the ranks that are present, those that can still take part in collectives."""
    left_behind: dict[int, str] = field(default_factory=dict)
    """Rank -> the phase in which it fell behind."""

    def get_leaders(self) -> dict[str, int]:
        """Node -> its first rank that is present."""
        return {
            node: alive[0]
            for node, ranks in self.nodes.items()
            if (alive := [rank for rank in ranks if rank in self.present])
        }


def build_roster(
    rendezvous: Rendezvous,
    ranks: Ranks,
    node: str,
    options: PreflightOptions,
    expected: Mapping[int, str],
) -> tuple[Roster | None, dict[int, str]]:
    """Find out who is there. Rank 0 waits for the others, at most `options.wait` seconds.

    Args:
        rendezvous: this rank's connection.
        ranks: this rank and the number of ranks.
        node: this rank's node.
        options: limits.
        expected: rank -> node, as far as the launcher says it.

    Returns:
        The roster (None for a rank that joined too late), and the missing ranks with their nodes.
    """
    rendezvous.put(f"hello/{ranks.rank}", node)
    if ranks.rank == 0:
        everybody = range(ranks.world_size)
        joined = rendezvous.collect("hello", everybody, options.wait)
        absent = {rank: expected.get(rank, "") for rank in everybody if rank not in joined}
        in_order = [[rank, joined[rank]] for rank in sorted(joined)]
        rendezvous.put("roster", [in_order, sorted(absent.items())])
    joined_in_order, absent_items = rendezvous.get("roster", options.wait + GRACE_S)
    nodes: dict[str, list[int]] = {}
    for rank, name in joined_in_order:
        nodes.setdefault(name, []).append(rank)
    present = [rank for rank, _ in joined_in_order]
    roster = Roster(nodes, present, list(present)) if ranks.rank in present else None
    return roster, {int(rank): name for rank, name in absent_items}
