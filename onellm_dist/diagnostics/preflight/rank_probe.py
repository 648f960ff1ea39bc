"""One rank's part of a preflight: its own checks, then clocks and links with the other ranks."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.errors import EXIT_FAILED
from onellm_dist.config.schema import RunConfig
from onellm_dist.diagnostics.preflight.disks import find_visible, probe_data, probe_disk
from onellm_dist.diagnostics.preflight.host import get_ecc_facts, get_gpu_facts, get_host_facts
from onellm_dist.diagnostics.preflight.killable_worker import KillableWorker
from onellm_dist.diagnostics.preflight.links import make_rounds, measure_all_reduce
from onellm_dist.diagnostics.preflight.options import ALL, PreflightOptions, SimulatedFaults
from onellm_dist.diagnostics.preflight.rendezvous import (
    GRACE_S,
    Rendezvous,
    TimeLimitError,
    run_within,
)
from onellm_dist.diagnostics.preflight.roster import Roster
from onellm_dist.diagnostics.preflight.versions import get_environment, get_versions
from onellm_dist.launch.ranks import Ranks

CLOCK_READINGS = 5
CLOCK_WAIT_S = 5.0
AFTER_TIME_LIMIT_S = 5.0
"""Limit of a rank's other checks after one of them was stuck: the other ranks wait for it."""
TOKEN = ".preflight-seen-by-all"
GPU = "gpu"


class RankProbe:
    """What this rank finds, in `report`.

    All ranks call the methods in the order in which they are defined, each at most once.

    Args:
        rendezvous: this rank's connection to the others.
        ranks: this rank and the number of ranks.
        roster: who takes part; kept up to date.
        node: this rank's node.
        options: limits.
        simulated: faults to simulate.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        ranks: Ranks,
        roster: Roster,
        node: str,
        options: PreflightOptions,
        simulated: SimulatedFaults,
    ) -> None:
        self.rendezvous = rendezvous
        self.ranks = ranks
        self.roster = roster
        self.node = node
        self.options = options
        self.simulated = simulated
        self.is_leader = roster.nodes[node][0] == ranks.rank
        self.fit = True
        self.hit_time_limit = False
        self.worker = KillableWorker(self._work_in_process)
        self.report: dict[str, Any] = {"rank": ranks.rank, "node": node, "errors": {}, "pairs": []}

    def run_local_checks(self, config: RunConfig | None) -> None:
        """Checks that need no other rank."""
        self._check("versions", "versions", lambda: get_versions(self.simulated))
        self.report["environment"] = get_environment()
        self._check("host", "host", lambda: get_host_facts(self.simulated))
        # The process is killed before this phase's limit.
        self._check("gpu", "gpu", lambda: self.worker.run(GPU, [], 0.9 * self._get_limit()))
        if (self.report.get("gpu") or {}).get("missing"):
            self.fit = False  # its partners would wait for a rank that cannot join
        if not self.is_leader:
            return
        self._check("ecc", "ecc", get_ecc_facts)
        if config is None:
            return
        self._check("disk", "disk", lambda: probe_disk(config.run.dir, self.node, self.simulated))
        folders = [
            place
            for entry in config.data.mixture
            if isinstance(place := config.data.locate(entry), Path)
        ]
        self._check("data", "data", lambda: probe_data(folders))

    def check_shared_directory(self, config: RunConfig) -> None:
        """Find out which nodes' files this node sees in `run.dir`.

        This shows which node has another directory, even if it is rank 0's node.
        """
        name = f"{TOKEN}-{os.environ.get('SLURM_JOB_ID', '')}{self.ranks.port}"
        own = config.run.dir / f"{name}-{self.ranks.rank}"
        if self.is_leader:
            self._check("shared", "", lambda: _write_token(own))
        if not self.enter("shared"):
            return
        if self.is_leader:
            files = {
                node: config.run.dir / f"{name}-{ranks[0]}"
                for node, ranks in self.roster.nodes.items()
                if ranks[0] in self.roster.present
            }
            self._check("shared", "sees", lambda: find_visible(files))
        if self.enter("shared-done") and self.is_leader:
            with suppress(OSError):
                own.unlink()

    def compare_clocks(self) -> dict[str, float]:
        """On rank 0: node -> seconds by which its clock is ahead of the nodes' median."""
        if not self.enter("clocks"):
            return {}
        leaders = self.roster.get_leaders()
        if self.ranks.rank != 0:
            if leaders.get(self.node) == self.ranks.rank:
                self._check("clocks", "", self._answer_clock)
            return {}
        offsets = {self.node: self.simulated.clock}
        others = {node: rank for node, rank in leaders.items() if rank != 0}
        self._check("clocks", "", partial(self._read_clocks, offsets, others))
        median = statistics.median(offsets.values())
        return {node: offset - median for node, offset in offsets.items()}

    def measure_links(self) -> None:
        """Measure all-reduces between pairs of nodes, then among all ranks."""
        if not self.enter("links"):
            return
        nodes = [
            node
            for node, ranks in self.roster.nodes.items()
            if any(rank in self.roster.fit for rank in ranks)
        ]
        for number, pairs in enumerate(make_rounds(nodes)):
            if not self.enter(f"links {number}"):
                return
            pair = next((p for p in pairs if self.node in p), None)
            if pair is not None and self.fit:
                self._measure_pair(number, pair)
        pairs_done = self.report["pairs"]
        # A rank that could communicate with nobody would stop all of them.
        self.fit = self.fit and (not pairs_done or any("speed" in pair for pair in pairs_done))
        if self.enter("all") and self.fit and len(self.roster.fit) > 1:
            result = self._measure("all", self.roster.fit)
            if "speed" in result:
                self.report["all"] = result["speed"]
            else:
                self.report["errors"][ALL] = result["error"]

    def _measure_pair(self, number: int, pair: tuple[str, str]) -> None:
        other = pair[1] if pair[0] == self.node else pair[0]
        fit = self.roster.fit
        if not any(rank in fit for rank in self.roster.nodes[other]):
            return
        members = sorted(rank for node in pair for rank in self.roster.nodes[node] if rank in fit)
        self.report["pairs"].append({"with": other, **self._measure(str(number), members)})

    def enter(self, phase: str) -> bool:
        """Meet the other ranks; everyone who does not come in time is left behind.

        Returns:
            Whether this rank still takes part.
        """
        present, fit = self.rendezvous.meet(
            phase, self.roster.present, self.options.limit, fit=self.fit
        )
        for rank in set(self.roster.present) - set(present):
            self.roster.left_behind[rank] = phase
        self.roster.present = present
        self.roster.fit = fit
        return self.ranks.rank in present

    def _get_limit(self) -> float:
        return AFTER_TIME_LIMIT_S if self.hit_time_limit else self.options.limit

    def _check(self, phase: str, key: str, work: Callable[[], Any]) -> None:
        """Run `work` within the limit; keep its result under `key`, or its failure as an error."""
        if self.simulated.gone_in == phase:
            os._exit(EXIT_FAILED)
        if self.simulated.stuck_in == phase:
            work = partial(time.sleep, 1e6)
        try:
            result = run_within(self._get_limit(), work)
        except TimeLimitError as error:
            self.hit_time_limit = True
            self.report["errors"][phase] = str(error)
        except Exception as error:  # a broken node may raise anything: it is the result
            self.report["errors"][phase] = get_first_line(error)
        else:
            if key:
                self.report[key] = result

    def _measure(self, name: str, members: Sequence[int]) -> dict[str, Any]:
        """Speed (bytes/s) of an all-reduce among these ranks, or an error."""
        try:
            return {"speed": self.worker.run(name, members, self.options.limit + GRACE_S)}
        except (TimeLimitError, RuntimeError) as error:
            return {"error": str(error)}

    def _work_in_process(self, name: str, members: Sequence[int]) -> Any:
        """Work on the GPU, in a process of its own.

        It may hang; and where GPUs are given to one process at a time, this one must not hold it.
        """
        if name == GPU:
            return get_gpu_facts(self.ranks.local_rank)
        return self._measure_speed(name, members)

    def _measure_speed(self, name: str, members: Sequence[int]) -> float:
        if self.simulated.link_stuck:
            time.sleep(1e6)
        connection = self.rendezvous.open_connection(self.options.limit)
        return measure_all_reduce(
            PrefixStore(f"links/{name}/{members[0]}", connection),
            self.ranks.rank,
            members,
            megabytes=self.options.megabytes,
            delay=self.simulated.link_delay,
            limit=self.options.limit,
            local_rank=self.ranks.local_rank,
        )

    def _answer_clock(self) -> None:
        rank = self.ranks.rank
        for i in range(CLOCK_READINGS):
            self.rendezvous.get(f"clock/{rank}/ask/{i}", self.options.limit)
            self.rendezvous.put(f"clock/{rank}/answer/{i}", time.time() + self.simulated.clock)

    def _read_clocks(self, offsets: dict[str, float], others: Mapping[str, int]) -> None:
        """Fill `offsets`; a node that does not answer is left out, and found at the next phase."""
        for node, rank in others.items():
            try:
                offsets[node] = self._read_clock(rank)
            except TimeoutError:
                continue

    def _read_clock(self, rank: int) -> float:
        """Seconds by which the rank's clock is ahead: the fastest of several readings counts."""
        readings = list[tuple[float, float]]()
        for i in range(CLOCK_READINGS):
            before = time.time()
            self.rendezvous.put(f"clock/{rank}/ask/{i}", True)
            answer = float(self.rendezvous.get(f"clock/{rank}/answer/{i}", CLOCK_WAIT_S))
            after = time.time()
            readings.append((after - before, answer - (before + after) / 2))
        return min(readings)[1] + self.simulated.clock


def _write_token(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("seen\n", encoding="ascii")
