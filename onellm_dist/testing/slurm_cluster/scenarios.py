"""What a run is put through in a rehearsal. Each scenario is a job of its own, from its submission to `done`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.testing.slurm_cluster.cluster import Cluster
from onellm_dist.testing.slurm_cluster.job import RunningJob

URGENT = "#!/bin/bash\n#SBATCH --job-name=urgent --partition=urgent --exclusive --output=/dev/null --nodes={nodes}\nsleep 1\n"


@dataclass(frozen=True)
class Stage:
    """What a scenario works with."""

    cluster: Cluster
    script: Path
    name: str
    """The job's name."""
    folder: Path
    """Working directory of the jobs; logs go here."""
    run_dir: Path
    every: int
    """Steps between two checkpoints."""
    patience_s: float

    def submit(self) -> RunningJob:
        """Submit the job script, to nodes that are all free: it takes as many as there are."""
        self.cluster.wait_for_nodes(self.cluster.nodes)
        return RunningJob(
            self.cluster,
            self.script,
            self.run_dir,
            name=self.name,
            cwd=self.folder,
            patience_s=self.patience_s,
        )


@dataclass(frozen=True)
class Interrupted:
    """How a run came through."""

    ended: str
    """How its first start ended: preempted, failed, lost; or done."""
    nodes: tuple[int, ...]
    """Node count of each start."""
    back_s: float | None
    """Seconds from the requeue to the first new step; None where nothing was interrupted."""
    redone: int
    """Steps that had to be done again."""


def clean(stage: Stage) -> Interrupted:
    """Nothing happens."""
    job = stage.submit()
    return _finish(job, None)


def preemption(stage: Stage) -> Interrupted:
    """A job of a partition that goes before ours takes all nodes for a moment."""
    job = stage.submit()
    job.wait_for_step(stage.every)
    urgent = stage.folder / "urgent.sbatch"
    urgent.write_text(URGENT.format(nodes=len(stage.cluster.nodes)), encoding="utf-8")
    stage.cluster.submit(urgent, cwd=stage.folder)
    return _back(job, stage.cluster.nodes)


def killed_rank(stage: Stage) -> Interrupted:
    """SIGKILL for a rank on the last node."""
    job = stage.submit()
    job.wait_for_step(stage.every)
    job.kill_rank(stage.cluster.nodes[-1])
    return _back(job, stage.cluster.nodes)


def lost_node(stage: Stage) -> Interrupted:
    """The last node goes down with all that runs on it; it comes back once the job is in the queue again."""
    job = stage.submit()
    job.wait_for_step(stage.every)
    node = stage.cluster.nodes[-1]
    stage.cluster.lose_node(node)
    try:
        requeued = job.wait_for_requeue(1)
    finally:
        stage.cluster.start_node(node)
    back = time.monotonic()
    stage.cluster.wait_for_messages()
    requeued += time.monotonic() - back  # the job is held up by the rehearsal here, not by Slurm
    return _back(job, stage.cluster.nodes, requeued)


def other_node_count(stage: Stage) -> Interrupted:
    """The job is told to stop while a node is closed for new jobs, so it comes back with one node less."""
    job = stage.submit()
    job.wait_for_step(stage.every)
    node = stage.cluster.nodes[-1]
    stage.cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=rehearsal")
    try:
        stage.cluster.run("scancel", "--signal=USR1", "--batch", str(job.number))
        return _back(job, stage.cluster.nodes[:-1])
    finally:
        stage.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


SCENARIOS: dict[str, Callable[[Stage], Interrupted]] = {
    "clean run": clean,
    "preemption": preemption,
    "SIGKILL of a rank": killed_rank,
    "loss of a node": lost_node,
    "other node count": other_node_count,
}
"""In this order; the first one is what the others are compared with."""


def _back(job: RunningJob, nodes: Sequence[str], requeued: float | None = None) -> Interrupted:
    """From an interruption to the end of the run, which goes on once `nodes` are free."""
    requeued = job.wait_for_requeue(1) if requeued is None else requeued
    job.cluster.wait_for_nodes(nodes)
    job.hurry()
    first_step = job.wait_for_first_step(1)
    return _finish(job, first_step - requeued)


def _finish(job: RunningJob, back_s: float | None) -> Interrupted:
    state = job.wait_for_end()
    attempts = job.attempts()
    if state != "COMPLETED" or not attempts or attempts[-1].status != "done":
        raise OneLLMError(
            f"job {job.number} ended as {state}, its run as {attempts[-1].status if attempts else 'nothing'}",
            job.tail(),
            f"its log: {job.log}",
        )
    first = attempts[0]
    redone = (first.steps_done or 0) - (first.checkpoint or 0) if back_s is not None else 0
    return Interrupted(first.status, tuple(len(a.nodes) for a in attempts), back_s, redone)
