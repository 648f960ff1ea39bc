"""A job in the throw-away Slurm: waiting for what it does, by polling with generous deadlines."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.launch.slurm.attempts import Attempt, read_attempts
from onellm_dist.testing.slurm_cluster.cluster import FINISHED, Cluster
from onellm_dist.testing.slurm_cluster.comparison import read_metrics

POLL_S = 0.1
ASK_S = 1.0
"""Between two questions to Slurm whether the job has ended, each of which starts a program."""
RESTART_S = 2.0
LOG_LINES = 40
TRAINING = "onellm_dist.train"
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


class RunningJob:
    """A submitted job script of a run.

    Args:
        cluster: the Slurm.
        script: the job script; it is submitted.
        run_dir: directory of the run.
        name: name of the job.
        cwd: working directory of the job; its log is written there.
        patience_s: longest wait for anything that the job does. On a busy machine the start of the
            ranks is the slowest.
        env: environment variables of the job besides the cluster's.
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
        self.cluster = cluster
        self.run_dir = run_dir
        self.number = cluster.submit(script, cwd=cwd, env=env)
        self.log = cwd / f"{name}-{self.number}.log"
        """File of the job's output."""
        self._patience_s = patience_s

    def read_attempts(self) -> list[Attempt]:
        """Read its starts so far."""
        return [a for a in read_attempts(self.run_dir) if a.job_id == str(self.number)]

    def count_restarts(self) -> int:
        """Count how often Slurm has requeued it."""
        return int(self.cluster.show_job(self.number)["Restarts"] or 0)

    def wait_for_step(self, step: int) -> None:
        """Wait until the current start has done the step with this index, or a later one."""
        self._wait_until(
            lambda: any(m["step"] >= step for m in read_metrics(self.run_dir)), f"step {step}"
        )

    def wait_for_requeue(self, restarts: int) -> float:
        """Wait until the job has been requeued so often and is in the queue.

        Args:
            restarts: number of requeues.

        Returns:
            `time.monotonic()` when the requeue was first seen.
        """
        seen = 0.0

        def is_requeued() -> bool:
            nonlocal seen
            job = self.cluster.show_job(self.number)
            if int(job["Restarts"] or 0) < restarts:
                return False
            seen = seen or time.monotonic()
            return job["JobState"] in ("PENDING", "RUNNING")

        self._wait_until(is_requeued, f"requeue {restarts}")
        return seen

    def start_soon(self) -> None:
        """Let a requeued job start soon, without its back-off.

        It does not start at once, because a node refuses a job that it ended within the same second
        ("credential revoked", Slurm 22.05).
        """
        time.sleep(RESTART_S)
        update = ("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        self._wait_until(
            lambda: self.cluster.run(*update, check=False).returncode == 0, "its next start"
        )

    def wait_for_first_step(self, restarts: int) -> float:
        """Wait until the start after so many requeues has done its first step.

        Args:
            restarts: number of requeues.

        Returns:
            `time.monotonic()` when the step was seen.
        """
        self._wait_until(
            lambda: any(a.restart_count >= restarts for a in self.read_attempts()),
            f"start {restarts + 1}",
        )
        fewest = len(read_metrics(self.run_dir))

        def has_grown() -> bool:  # the start first drops the lines after its checkpoint
            nonlocal fewest
            lines = len(read_metrics(self.run_dir))
            fewest = min(fewest, lines)
            return lines > fewest

        self._wait_until(has_grown, f"the first step of start {restarts + 1}")
        return time.monotonic()

    def wait_for_end(self) -> str:
        """Wait until the job has ended for good; returns Slurm's word for how."""
        self._wait_until(self._is_finished, "the end", poll_s=ASK_S / 2)
        return self.cluster.show_job(self.number)["JobState"]

    def find_rank(self, node: str) -> int:
        """Find a rank on a node; returns its process id as seen from here.

        Raises:
            OneLLMError: no rank runs there.
        """
        parents = dict(find_training_processes(self.cluster.list_pids(node)))
        ranks = [pid for pid, parent in parents.items() if parent not in parents]
        if not ranks:
            raise OneLLMError(f"no rank runs on {node}", "it cannot be killed.", f"see {self.log}.")
        return max(ranks)

    def kill_rank(self, node: str) -> None:
        """Kill one rank by SIGKILL, as the kernel does when memory is out."""
        os.kill(self.find_rank(node), signal.SIGKILL)

    def read_log_tail(self) -> str:
        """Read the last lines of the job's log."""
        if not self.log.exists():
            return "(no log)"
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-LOG_LINES:])

    def _is_finished(self) -> bool:
        return self.cluster.show_job(self.number)["JobState"] in FINISHED

    def _wait_until(
        self, condition: Callable[[], bool], what: str, *, poll_s: float = POLL_S
    ) -> None:
        deadline = time.monotonic() + self._patience_s
        asked = -math.inf
        while not condition():
            finished = False
            if what != "the end" and time.monotonic() > asked + ASK_S:
                finished, asked = self._is_finished(), time.monotonic()
            if (finished and not condition()) or time.monotonic() > deadline:
                job = self.cluster.show_job(self.number)
                raise OneLLMError(
                    f"job {self.number} did not reach {what}: {job['JobState']} ({job['Reason']})",
                    self.read_log_tail(),
                    f"its log: {self.log}",
                )
            time.sleep(poll_s)


def find_training_processes(pids: list[int]) -> list[tuple[int, int]]:
    """Find ranks and their loader workers among processes, without launchers.

    Args:
        pids: the processes.

    Returns:
        (process, parent) of each.
    """
    found = []
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
            environment = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
            parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:  # it has ended meanwhile
            continue
        if TRAINING not in words:
            continue
        # Behind the module's name come arguments, and a folder may have any name.
        before = words[: words.index(TRAINING)]
        is_launcher = any(Path(word).name in LAUNCHERS for word in before)
        has_rank = any(item.startswith(("RANK=", "SLURM_PROCID=")) for item in environment)
        if has_rank and not is_launcher:
            found.append((pid, int(parent)))
    return found
