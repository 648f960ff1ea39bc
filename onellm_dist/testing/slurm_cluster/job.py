"""A job in the throw-away Slurm while it runs: waiting for what it does, by polling with generous deadlines."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.launch.slurm.attempts import Attempt, read_attempts
from onellm_dist.testing.slurm_cluster.cluster import FINISHED, Cluster
from onellm_dist.testing.slurm_cluster.history import read_metrics

POLL_S, RESTART_S = 0.1, 2.0
LOG_LINES = 40
TRAINING = "onellm_dist.train"


class RunningJob:
    """A submitted job script of a run.

    Args:
        env: added to the cluster's environment for the job.
        patience_s: longest wait for anything it does; a start of ranks on a busy machine is the slowest.
    """

    def __init__(
        self,
        cluster: Cluster,
        script: Path,
        run_dir: Path,
        *,
        name: str,
        cwd: Path,
        patience_s: float,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.cluster, self.run_dir, self._cwd, self._patience_s = cluster, run_dir, cwd, patience_s
        self._name = name
        self.number = cluster.submit(script, cwd=cwd, env=env)

    @property
    def log(self) -> Path:
        """Where Slurm writes what the job prints."""
        return self._cwd / f"{self._name}-{self.number}.log"

    def attempts(self) -> list[Attempt]:
        """Its starts so far."""
        return [a for a in read_attempts(self.run_dir) if a.job_id == str(self.number)]

    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.cluster.job(self.number)["Restarts"] or 0)

    def wait_for_step(self, step: int) -> None:
        """Until a step with this index (or a later one) is done in the start that is going on."""
        self._until(
            lambda: any(m["step"] >= step for m in read_metrics(self.run_dir)), f"step {step}"
        )

    def wait_for_requeue(self, restarts: int) -> float:
        """Until it was requeued so often and waits in the queue. Returns the clock (`time.monotonic`) when that was seen first."""
        seen = 0.0

        def requeued() -> bool:
            nonlocal seen
            job = self.cluster.job(self.number)
            if int(job["Restarts"] or 0) < restarts:
                return False
            seen = seen or time.monotonic()
            return job["JobState"] in ("PENDING", "RUNNING")

        self._until(requeued, f"requeue {restarts}")
        return seen

    def hurry(self) -> None:
        """Let a requeued job start soon: its back-off is for clusters that are paid for.

        Not at once, for nodes refuse a job that they ended in the same second ("credential revoked", Slurm 22.05).
        """
        time.sleep(RESTART_S)
        update = ("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        self._until(
            lambda: self.cluster.run(*update, check=False).returncode == 0, "its next start"
        )

    def wait_for_first_step(self, restarts: int) -> float:
        """Until the start after so many requeues did its first step. Returns the clock when that was seen."""
        self._until(
            lambda: any(a.restart_count >= restarts for a in self.attempts()),
            f"start {restarts + 1}",
        )
        least = len(read_metrics(self.run_dir))

        def grew() -> bool:  # it first drops the lines after its checkpoint
            nonlocal least
            found = len(read_metrics(self.run_dir))
            least = min(least, found)
            return found > least

        self._until(grew, f"the first step of start {restarts + 1}")
        return time.monotonic()

    def wait_for_end(self) -> str:
        """Until it is over for good. Returns Slurm's word for how."""
        self._until(self._over, "the end")
        return self.cluster.job(self.number)["JobState"]

    def rank_process(self, node: str) -> int:
        """A rank on a node (the process id as seen from here)."""
        found = {pid: int(parent) for pid, parent in trainings(self.cluster.pids(node))}
        ranks = [pid for pid, parent in found.items() if parent not in found]
        if not ranks:
            raise OneLLMError(f"no rank runs on {node}", "it cannot be killed.", f"see {self.log}.")
        return max(ranks)

    def kill_rank(self, node: str) -> None:
        """SIGKILL for one rank, as the kernel does it when memory is out."""
        os.kill(self.rank_process(node), signal.SIGKILL)

    def _over(self) -> bool:
        return self.cluster.job(self.number)["JobState"] in FINISHED

    def _until(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._patience_s
        while not true():
            over = what != "the end" and self._over()
            if (over and not true()) or time.monotonic() > deadline:
                state = self.cluster.job(self.number)
                raise OneLLMError(
                    f"job {self.number} did not come to {what}: {state['JobState']} ({state['Reason']})",
                    self.tail(),
                    f"its log: {self.log}",
                )
            time.sleep(POLL_S)

    def tail(self) -> str:
        """The last lines of its log."""
        if not self.log.exists():
            return "(no log)"
        return "\n".join(
            self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        )


LAUNCHERS = frozenset(
    (
        "torch.distributed.run",
        "torchrun",
        "deepspeed.launcher.launch",
        "deepspeed",
        "srun",
        "pdsh",
        "ssh",
    )
)
"""Programs and modules whose command line names the training module too."""


def trainings(pids: list[int]) -> list[tuple[int, int]]:
    """(process, parent) of those that train: ranks and their loader workers, without launchers."""
    found = []
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
            environment = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
            parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:  # it ended meanwhile
            continue
        before = (
            words[: words.index(TRAINING)] if TRAINING in words else words
        )  # behind it, folders may have any name
        launcher = any(Path(word).name in LAUNCHERS for word in before)
        has_rank = any(item.startswith(("RANK=", "SLURM_PROCID=")) for item in environment)
        if TRAINING in words and not launcher and has_rank:
            found.append((pid, int(parent)))
    return found
