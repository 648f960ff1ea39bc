"""The demo's child processes: public commands, their progress read from log files, and a kill."""

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

COUNT = r"(\d+)/(\d+)"
TAIL_BYTES = 4096
POLL_S = 0.5


@dataclass
class DemoProcess:
    """One command of the demo.

    Attributes:
        name: name for people.
        command: its words.
        log: file for its output, which is appended.
        environment: variables besides the parent's.
        count_pattern: pattern in its output; its two groups are what is done, and the whole.
        kill_at: share of its progress at which the whole process tree gets SIGKILL; None: never.
        process: the running process; None before it is started.
        killed: whether it was killed on purpose.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    count_pattern: str = COUNT
    kill_at: float | None = None
    process: subprocess.Popen[bytes] | None = None
    killed: bool = False
    _out: IO[bytes] | None = None
    _log_start: int = 0

    def start(self) -> None:
        """Start it in a session of its own; what it starts is found by its process tree."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._out = self.log.open("ab")
        self._out.write(f"$ {' '.join(self.command)}\n".encode())
        self._out.flush()
        self.process = subprocess.Popen(
            self.command,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )

    def read_progress(self) -> float:
        """Read the share that is done from the last count in its output; 0 if there is none."""
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, self.log.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
        counts = re.findall(self.count_pattern, text)
        done, total = map(int, counts[-1]) if counts else (0, 1)
        return min(1.0, done / total) if total else 0.0

    def poll(self) -> int | None:
        """Get the exit code, or None while it runs; kill its tree when `kill_at` is reached."""
        assert self.process is not None
        if (
            self.process.poll() is None
            and self.kill_at is not None
            and not self.killed
            and self.read_progress() >= self.kill_at
        ):
            kill_tree(self.process.pid)
            self.process.wait()
            self.killed = True
        code = self.process.poll()
        if code is not None and self._out is not None:
            self._out.close()
            self._out = None
        return code

    def read_tail(self, lines: int = 25) -> str:
        """Read the last lines of its output."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def kill_tree(pid: int) -> int:
    """Kill a process and everything it started by SIGKILL; returns how many were killed."""
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return 0
    killed = 0
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
            killed += 1
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    return killed


def run_lanes(
    lanes: Sequence[Sequence[DemoProcess]], on_progress: Callable[[Sequence[DemoProcess]], None]
) -> None:
    """Run lanes side by side; the processes of a lane run one after the other.

    A process that was killed on purpose counts as finished.

    Args:
        lanes: the processes.
        on_progress: called twice a second with the running processes.

    Raises:
        OneLLMError: a process failed; the others are stopped.
    """
    waiting = [list(lane) for lane in lanes]
    running: dict[int, DemoProcess] = {}
    try:
        while running or any(waiting):
            for number, lane in enumerate(waiting):
                if number not in running and lane:
                    running[number] = lane.pop(0)
                    running[number].start()
            for number, child in list(running.items()):
                code = child.poll()
                if code is None:
                    continue
                del running[number]
                if code != 0 and not child.killed:
                    raise OneLLMError(
                        f"{child.name} failed (exit code {code}):\n{child.read_tail()}",
                        "the demo cannot continue.",
                        f"see {child.log} for all of its output.",
                    )
            on_progress(list(running.values()))
            time.sleep(POLL_S)
    finally:
        for child in running.values():
            if child.process is not None:
                kill_tree(child.process.pid)
