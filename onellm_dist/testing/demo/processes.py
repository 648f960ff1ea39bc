"""The demo's child processes: public commands, their output in log files, their progress read from there, and a kill."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from onellm_dist.common.errors import OneLLMError

_PROGRESS = r"(\d+)/(\d+)"
_TAIL_BYTES = 4096
_LOOK_SECONDS = 0.5


@dataclass
class Job:
    """One command.

    Attributes:
        name: what people read.
        command: its words.
        log: where its output goes (appended).
        environment: variables beside the parent's.
        counted: pattern of its output whose two groups are what is done and the whole.
        kill_at: share of its progress at which the whole process tree gets SIGKILL; None: it is let alone.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    counted: str = _PROGRESS
    kill_at: float | None = None
    process: subprocess.Popen[bytes] | None = None
    killed: bool = False
    _out: IO[bytes] | None = None
    _from: int = 0

    def start(self) -> None:
        """Start it, in a session of its own: what it starts is found by its process tree."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._out = self.log.open("ab")
        self._from = self._out.tell()
        self._out.write(f"$ {' '.join(self.command)}\n".encode())
        self._out.flush()
        self.process = subprocess.Popen(
            self.command,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )

    def progress(self) -> float:
        """Share done, by the last count in the output of this start; 0 before there is one."""
        with self.log.open("rb") as file:
            file.seek(max(self._from, self.log.stat().st_size - _TAIL_BYTES))
            found = re.findall(self.counted, file.read().decode("utf-8", errors="replace"))
        done, total = map(int, found[-1]) if found else (0, 1)
        return min(1.0, done / total) if total else 0.0

    def poll(self) -> int | None:
        """The exit code, or None while it runs; kills the tree when `kill_at` is reached."""
        assert self.process is not None
        code = self.process.poll()
        if (
            code is None
            and self.kill_at is not None
            and not self.killed
            and self.progress() >= self.kill_at
        ):
            kill_tree(self.process.pid)
            self.process.wait()
            self.killed = True
        code = self.process.poll()
        if code is not None and self._out is not None:
            self._out.close()
            self._out = None
        return code

    def tail(self, lines: int = 25) -> str:
        """The last lines of the output."""
        return "\n".join(
            self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        )


def kill_tree(pid: int) -> int:
    """SIGKILL a process and everything it started, wherever they moved; returns how many were hit."""
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return 0
    hit = 0
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
            hit += 1
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    return hit


def run_lanes(lanes: Sequence[Sequence[Job]], tell: Callable[[Sequence[Job]], None]) -> None:
    """Run lanes side by side, the jobs of a lane one after the other; `tell(running)` is called twice a second.

    A job that was killed on purpose counts as ended.

    Raises:
        OneLLMError: a job failed; the others are stopped.
    """
    waiting = [list(lane) for lane in lanes]
    running: dict[int, Job] = {}
    try:
        while running or any(waiting):
            for number, lane in enumerate(waiting):
                if number not in running and lane:
                    running[number] = lane.pop(0)
                    running[number].start()
            for number, job in list(running.items()):
                code = job.poll()
                if code is None:
                    continue
                del running[number]
                if code != 0 and not job.killed:
                    raise OneLLMError(
                        f"{job.name} failed (exit code {code}):\n{job.tail()}",
                        "the demo cannot go on.",
                        f"see {job.log} for everything it said.",
                    )
            tell(list(running.values()))
            time.sleep(_LOOK_SECONDS)
    finally:
        for job in running.values():
            if job.process is not None:
                kill_tree(job.process.pid)
