"""What a run is put through in a rehearsal; each scenario is one job, from submission to `done`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.testing.slurm_cluster.cluster import Cluster
from onellm_dist.testing.slurm_cluster.running_job import RunningJob

URGENT_JOB = """\
#!/bin/bash
#SBATCH --job-name=urgent --partition=urgent --exclusive --output=/dev/null --nodes={nodes}
sleep 1
"""


@dataclass(frozen=True)
class ScenarioSetup:
    """What a scenario works with."""

    cluster: Cluster
    script: Path
    name: str
    """Name of the job."""
    folder: Path
    """Working directory of the jobs; their logs are written there."""
    run_dir: Path
    every: int
    """Steps between two checkpoints."""
    patience_s: float
    """Longest wait for anything that the job does."""

    def submit(self) -> RunningJob:
        """Submit the job script once all nodes are free, so that it gets as many as there are."""
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
class Recovery:
    """How a run got through a scenario."""

    first_status: str
    """End of the run's first start: preempted, failed or lost; done if nothing happened to it."""
    nodes: tuple[int, ...]
    """Number of nodes of each start."""
    resume_s: float | None
    """Seconds from the requeue to the first new step; None if the run was not interrupted."""
    lost_steps: int
    """Steps that had to be repeated."""


def run_undisturbed(setup: ScenarioSetup) -> Recovery:
    """Let the job run to its end."""
    return _finish(setup.submit(), None)


def preempt(setup: ScenarioSetup) -> Recovery:
    """Let a job of a more urgent partition take all nodes for a moment."""
    job = setup.submit()
    job.wait_for_step(setup.every)
    urgent = setup.folder / "urgent.sbatch"
    urgent.write_text(URGENT_JOB.format(nodes=len(setup.cluster.nodes)), encoding="utf-8")
    setup.cluster.submit(urgent, cwd=setup.folder)
    return _resume(job, setup.cluster.nodes)


def kill_rank(setup: ScenarioSetup) -> Recovery:
    """Kill a rank on the last node by SIGKILL."""
    job = setup.submit()
    job.wait_for_step(setup.every)
    job.kill_rank(setup.cluster.nodes[-1])
    return _resume(job, setup.cluster.nodes)


def lose_node(setup: ScenarioSetup) -> Recovery:
    """End the last node with all that runs on it; bring it back once the job is requeued."""
    job = setup.submit()
    job.wait_for_step(setup.every)
    node = setup.cluster.nodes[-1]
    setup.cluster.lose_node(node)
    try:
        requeued = job.wait_for_requeue(1)
    finally:
        setup.cluster.start_node(node)
    back = time.monotonic()
    setup.cluster.wait_for_messages()
    requeued += time.monotonic() - back  # the rehearsal holds the job up here, not Slurm
    return _resume(job, setup.cluster.nodes, requeued)


def change_node_count(setup: ScenarioSetup) -> Recovery:
    """Stop the job while a node accepts no new jobs, so that it comes back with one node less."""
    job = setup.submit()
    job.wait_for_step(setup.every)
    node = setup.cluster.nodes[-1]
    setup.cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=rehearsal")
    try:
        setup.cluster.run("scancel", "--signal=USR1", "--batch", str(job.number))
        return _resume(job, setup.cluster.nodes[:-1])
    finally:
        setup.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


SCENARIOS: dict[str, Callable[[ScenarioSetup], Recovery]] = {
    "clean run": run_undisturbed,
    "preemption": preempt,
    "SIGKILL of a rank": kill_rank,
    "loss of a node": lose_node,
    "other node count": change_node_count,
}
"""The scenarios in their order; the others are compared with the first one."""


def _resume(job: RunningJob, nodes: Sequence[str], requeued: float | None = None) -> Recovery:
    """From an interruption to the end of the run, which resumes once `nodes` are free."""
    requeued = job.wait_for_requeue(1) if requeued is None else requeued
    job.cluster.wait_for_nodes(nodes)
    job.start_soon()
    first_step = job.wait_for_first_step(1)
    return _finish(job, first_step - requeued)


def _finish(job: RunningJob, resume_s: float | None) -> Recovery:
    state = job.wait_for_end()
    attempts = job.read_attempts()
    if state != "COMPLETED" or not attempts or attempts[-1].status != "done":
        status = attempts[-1].status if attempts else "no start at all"
        raise OneLLMError(
            f"job {job.number} ended as {state}, its run as {status}",
            job.read_log_tail(),
            f"its log: {job.log}",
        )
    first = attempts[0]
    lost_steps = (first.steps_done or 0) - (first.checkpoint or 0) if resume_s is not None else 0
    return Recovery(first.status, tuple(len(a.nodes) for a in attempts), resume_s, lost_steps)
