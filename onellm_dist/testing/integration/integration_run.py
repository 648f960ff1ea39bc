"""The state of an integration run: its folder, its results so far, and the commands it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.logging import get_logger
from onellm_dist.testing.integration.memory import GIB, PeakMemory

LAUNCHER_NOISE = ("[INFO]", "fetch_hostfile")
"""Lines of the deepspeed launcher that go to the log file alone."""
TAIL_LINES = 15

logger = get_logger(__name__)


@dataclass
class IntegrationRun:
    """One integration run in the folder `out`."""

    out: Path
    steps: int
    """Optimizer steps of each stage."""
    ranks: int
    new_tokens: int
    """Tokens of the longest answer."""
    preset: str
    memory: PeakMemory
    facts: dict[str, Any] = field(default_factory=lambda: {"phases": [], "events": []})
    """What was found so far; it is written as the report."""
    started: float = field(default_factory=time.monotonic)

    def log(self, message: str) -> None:
        """Log a message with the time since the start, and add it to the report's events."""
        seconds = time.monotonic() - self.started
        logger.info("[%3d:%02d] %s", int(seconds) // 60, int(seconds) % 60, message)
        self.facts["events"].append({"seconds": round(seconds, 1), "event": message})

    @contextmanager
    def measure_phase(self, name: str) -> Iterator[None]:
        """Measure the time and the peak memory of what runs inside the block."""
        self.log(f"{name} ...")
        began = time.monotonic()
        try:
            yield
        finally:
            self.facts["phases"].append(
                {
                    "phase": name,
                    "seconds": round(time.monotonic() - began, 1),
                    "peak_gib": round(self.memory.get_peak(began) / GIB, 2),
                }
            )

    def run_command(
        self,
        name: str,
        arguments: Sequence[str | Path],
        *,
        ranks: int = 1,
        show: bool = False,
        stdin: Path | None = None,
    ) -> str:
        """Run a command; its output goes to `logs/NAME.log`.

        Args:
            name: name of the log file.
            arguments: the command.
            ranks: number of its processes; they share the cores.
            show: whether its output is logged too.
            stdin: file with its input; default: none.

        Returns:
            The command's output.

        Raises:
            OneLLMError: it failed; the message has its last lines.
        """
        path = self.out / "logs" / f"{name}.log"
        path.parent.mkdir(exist_ok=True)
        environment = self.make_environment(ranks)
        lines: list[str] = []
        with (
            path.open("a", encoding="utf-8") as log,
            start_group([str(a) for a in arguments], environment, stdin=stdin) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                lines.append(line)
                if show and not any(noise in line for noise in LAUNCHER_NOISE):
                    logger.info("        %s", line.rstrip("\n"))
        if process.returncode:
            text = path.read_text(encoding="utf-8", errors="replace")
            tail = "\n".join(f"  {line}" for line in text.splitlines()[-TAIL_LINES:])
            raise OneLLMError(
                f"{name} ended with exit code {process.returncode}\n{tail}",
                "the integration run stops here.",
                f"see {path}.",
            )
        return "".join(lines)

    def make_environment(self, ranks: int) -> dict[str, str]:
        """Environment of a command: the fetched LLM package, and the cores split among its ranks.

        Ranks run on CPUs where there are fewer GPUs than ranks.

        Args:
            ranks: number of processes of the command.
        """
        import torch

        environment = dict(os.environ)
        paths = [str(self.out / "packages" / "site"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        environment |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        if torch.cuda.device_count() < self.ranks:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return environment


@contextmanager
def start_group(
    arguments: list[str], environment: dict[str, str], *, stdin: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a process group of its own.

    The whole group is killed if the block is left early (Ctrl-C, SIGTERM), because launchers do
    not end their ranks.

    Args:
        arguments: the command.
        environment: its environment variables.
        stdin: file with its input; default: none.
    """
    given: IO[bytes]
    with (
        Path(stdin or os.devnull).open("rb") as given,
        subprocess.Popen(
            arguments,
            env=environment,
            text=True,
            errors="replace",
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
