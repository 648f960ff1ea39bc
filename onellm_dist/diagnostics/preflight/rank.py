"""One rank's part of a preflight: its own checks, then links and clocks with the others, each with a time limit."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore

from onellm_dist.common.errors import EXIT_FAILED
from onellm_dist.config.schema import RunConfig
from onellm_dist.diagnostics.preflight.attempts import Tries, first_line
from onellm_dist.diagnostics.preflight.disks import data_probe, seen, write_probe
from onellm_dist.diagnostics.preflight.host import ecc_facts, gpu_facts, host_facts
from onellm_dist.diagnostics.preflight.links import all_reduce_speed, rounds_of
from onellm_dist.diagnostics.preflight.options import ALL, Options, Pretence
from onellm_dist.diagnostics.preflight.rendezvous import GRACE_S, Meeting, Overdue, within
from onellm_dist.diagnostics.preflight.versions import environment, versions
from onellm_dist.launch.ranks import Ranks

CLOCK_TRIES, CLOCK_PATIENCE_S = 5, 5.0
AFTER_OVERDUE_S = 5.0
"""What is left for a rank's other checks when one of them was stuck: the others wait for it."""
TOKEN = ".preflight-seen-by-all"
GPU = "gpu"


@dataclass
class Team:
    """Who takes part. Ranks that fall behind leave it."""

    nodes: dict[str, list[int]]
    """Node -> its ranks that came, in the order of ranks."""
    present: list[int]
    fit: list[int]
    """Of those, the ranks that can still take part in collectives."""
    left_behind: dict[int, str] = field(default_factory=dict)

    def leaders(self) -> dict[str, int]:
        """Node -> its first rank that is present."""
        return {
            node: alive[0]
            for node, ranks in self.nodes.items()
            if (alive := [r for r in ranks if r in self.present])
        }


class Rank:
    """What this rank finds, in `report`; every method may be called once, in the order of their names below by all ranks."""

    def __init__(
        self,
        meeting: Meeting,
        ranks: Ranks,
        team: Team,
        node: str,
        options: Options,
        pretence: Pretence,
    ) -> None:
        self.meeting, self.ranks, self.team, self.node, self.options, self.pretence = (
            meeting,
            ranks,
            team,
            node,
            options,
            pretence,
        )
        self.leader = team.nodes[node][0] == ranks.rank
        self.fit, self.overdue = True, False
        self.tries = Tries(self._in_a_process)
        self.report: dict[str, Any] = {"rank": ranks.rank, "node": node, "errors": {}, "pairs": []}

    def look_around(self, config: RunConfig | None) -> None:
        """What needs no other rank."""
        self._guarded("versions", "versions", lambda: versions(self.pretence))
        self.report["environment"] = environment()
        self._guarded("host", "host", lambda: host_facts(self.pretence))
        self._guarded(
            "gpu", "gpu", lambda: self.tries.do(GPU, [], 0.9 * self._limit())
        )  # ends before it is left
        if (self.report.get("gpu") or {}).get("missing"):
            self.fit = False  # its partners would wait for a rank that cannot join
        if not self.leader:
            return
        self._guarded("ecc", "ecc", ecc_facts)
        if config is None:
            return
        self._guarded("disk", "disk", lambda: write_probe(config.run.dir, self.node, self.pretence))
        folders = [
            place
            for entry in config.data.mixture
            if isinstance(place := config.data.locate(entry), Path)
        ]
        self._guarded("data", "data", lambda: data_probe(folders))

    def share_directory(self, config: RunConfig) -> None:
        """Which nodes' files each node sees in run.dir: so the one that has another directory can be told, be it rank 0's."""
        name = f"{TOKEN}-{os.environ.get('SLURM_JOB_ID', '')}{self.ranks.port}"
        own = config.run.dir / f"{name}-{self.ranks.rank}"
        if self.leader:
            self._guarded("shared", "", lambda: self._write(own))
        if not self.enter("shared"):
            return
        if self.leader:
            first = {
                node: ranks[0]
                for node, ranks in self.team.nodes.items()
                if ranks[0] in self.team.present
            }
            self._guarded(
                "shared",
                "sees",
                lambda: seen(
                    {node: config.run.dir / f"{name}-{rank}" for node, rank in first.items()}
                ),
            )
        if self.enter("shared-done") and self.leader:
            with suppress(OSError):
                own.unlink()

    def compare_clocks(self) -> dict[str, float]:
        """On rank 0: node -> seconds that its clock is ahead of the nodes' median."""
        if not self.enter("clocks"):
            return {}
        leaders = self.team.leaders()
        if self.ranks.rank != 0:
            if leaders.get(self.node) == self.ranks.rank:
                self._guarded("clocks", "", self._answer_clock)
            return {}
        offsets = {self.node: self.pretence.clock}
        others = {node: rank for node, rank in leaders.items() if rank != 0}
        self._guarded("clocks", "", partial(self._ask_clocks, offsets, others))
        middle = statistics.median(offsets.values())
        return {node: offset - middle for node, offset in offsets.items()}

    def try_links(self) -> None:
        """All-reduces between pairs of nodes, then among all ranks."""
        if not self.enter("links"):
            return
        nodes = [
            node
            for node, ranks in self.team.nodes.items()
            if any(r in self.team.fit for r in ranks)
        ]
        for number, pairs in enumerate(rounds_of(nodes)):
            if not self.enter(f"links {number}"):
                return
            pair = next((p for p in pairs if self.node in p), None)
            if pair is None or not self.fit:
                continue
            other = pair[1] if pair[0] == self.node else pair[0]
            if not any(r in self.team.fit for r in self.team.nodes[other]):
                continue
            members = sorted(
                r for node in pair for r in self.team.nodes[node] if r in self.team.fit
            )
            self.report["pairs"].append({"with": other, **self._try(str(number), members)})
        pairs = self.report["pairs"]
        self.fit = self.fit and (
            not pairs or any("speed" in pair for pair in pairs)
        )  # one that got on with nobody would stop all
        if self.enter("all") and self.fit and len(self.team.fit) > 1:
            together = self._try("all", self.team.fit)
            if "speed" in together:
                self.report["all"] = together["speed"]
            else:
                self.report["errors"][ALL] = together["error"]

    def enter(self, phase: str) -> bool:
        """Meets the others; false where this rank was left behind. Everyone that does not come is left behind."""
        present, fit = self.meeting.gate(phase, self.team.present, self.options.limit, fit=self.fit)
        for rank in set(self.team.present) - set(present):
            self.team.left_behind[rank] = phase
        self.team.present, self.team.fit = present, fit
        return self.ranks.rank in present

    def _limit(self) -> float:
        return AFTER_OVERDUE_S if self.overdue else self.options.limit

    def _guarded(self, phase: str, key: str, work: Callable[[], Any]) -> None:
        """Do `work` in time and keep its result under `key`; a failure is kept as the phase's error."""
        if self.pretence.gone_in == phase:
            os._exit(EXIT_FAILED)
        if self.pretence.stuck_in == phase:
            work = partial(time.sleep, 1e6)
        try:
            found = within(self._limit(), work)
        except Overdue as error:
            self.overdue = True
            self.report["errors"][phase] = str(error)
        except Exception as error:  # a broken node may raise anything: it is the finding
            self.report["errors"][phase] = first_line(error)
        else:
            if key:
                self.report[key] = found

    def _try(self, name: str, members: Sequence[int]) -> dict[str, Any]:
        """Speed (bytes/s) of an all-reduce among these ranks, or error."""
        try:
            return {"speed": self.tries.do(name, members, self.options.limit + GRACE_S)}
        except (Overdue, RuntimeError) as error:
            return {"error": str(error)}

    def _in_a_process(self, name: str, members: Sequence[int]) -> Any:
        """What touches the GPU: it may hang, and where GPUs are given to one process at a time, this one must not hold it."""
        return gpu_facts(self.ranks.local_rank) if name == GPU else self._speed(name, members)

    def _speed(self, name: str, members: Sequence[int]) -> float:
        if self.pretence.link_stuck:
            time.sleep(1e6)
        store = PrefixStore(f"links/{name}/{members[0]}", self.meeting.another(self.options.limit))
        return all_reduce_speed(
            store,
            self.ranks.rank,
            members,
            megabytes=self.options.megabytes,
            delay=self.pretence.link_delay,
            limit=self.options.limit,
            local_rank=self.ranks.local_rank,
        )

    def _write(self, token: Path) -> None:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("seen\n", encoding="ascii")

    def _answer_clock(self) -> None:
        for i in range(CLOCK_TRIES):
            self.meeting.get(f"clock/{self.ranks.rank}/ask/{i}", self.options.limit)
            self.meeting.put(f"clock/{self.ranks.rank}/say/{i}", time.time() + self.pretence.clock)

    def _ask_clocks(self, offsets: dict[str, float], others: Mapping[str, int]) -> None:
        """Fills `offsets`; a node that does not answer is left out, and found by the next gate."""
        for node, rank in others.items():
            try:
                offsets[node] = self._ask_clock(rank)
            except TimeoutError:
                continue

    def _ask_clock(self, rank: int) -> float:
        """Seconds that the rank's clock is ahead of this one: of several tries the one with the shortest way."""
        tries = list[tuple[float, float]]()
        for i in range(CLOCK_TRIES):
            before = time.time()
            self.meeting.put(f"clock/{rank}/ask/{i}", True)
            said = float(self.meeting.get(f"clock/{rank}/say/{i}", CLOCK_PATIENCE_S))
            after = time.time()
            tries.append((after - before, said - (before + after) / 2))
        return min(tries)[1] + self.pretence.clock


def roll_call(
    meeting: Meeting, ranks: Ranks, node: str, options: Options, expected: Mapping[int, str]
) -> tuple[Team | None, dict[int, str]]:
    """Who is there. Rank 0 waits for the others, at most `options.wait` seconds.

    Args:
        expected: rank -> node, as far as the launcher says it.

    Returns:
        The team (None for a rank that came too late), and the missing ranks with their nodes.
    """
    meeting.put(f"hello/{ranks.rank}", node)
    if ranks.rank == 0:
        came = meeting.collect("hello", range(ranks.world_size), options.wait)
        missing = {
            rank: expected.get(rank, "") for rank in range(ranks.world_size) if rank not in came
        }
        meeting.put(
            "roll", [[[rank, came[rank]] for rank in sorted(came)], sorted(missing.items())]
        )
    came_in_order, missing_items = meeting.get("roll", options.wait + GRACE_S)
    nodes: dict[str, list[int]] = {}
    for rank, name in came_in_order:
        nodes.setdefault(name, []).append(rank)
    present = [rank for rank, _ in came_in_order]
    team = Team(nodes, present, list(present)) if ranks.rank in present else None
    return team, {int(rank): name for rank, name in missing_items}
