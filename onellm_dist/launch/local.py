"""Ranks on this machine, where no launcher started us: start them, pass signals on, and say which one failed first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED

PARENT_VARIABLE = "ONELLM_LOCAL_PARENT"
"""Tells a rank that it must end with the process of this id."""
FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
PATIENCE_S = 20.0
"""Seconds the other ranks have, after one ended, before they are ended too."""
TAIL_LINES = 60


def launch_local(command: Sequence[str], ranks: int, logs: Path) -> int:
    """Run `command` once a rank on this machine and wait for all of them.

    Rank 0's output is passed through; the others write to `logs/rank-N.log`. USR1, TERM and INT go on to every rank.
    When one fails, its output is shown first and the others are ended.

    Returns:
        0; else the exit code of the first rank that failed (1 where a signal ended it).
    """
    logs.mkdir(parents=True, exist_ok=True)
    group = _Group(command, ranks, logs)
    before = {number: signal.signal(number, group.forward) for number in FORWARDED}
    try:
        return group.wait()
    finally:
        group.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Group:
    def __init__(self, command: Sequence[str], ranks: int, logs: Path) -> None:
        port = free_port()
        self.logs = [logs / f"rank-{rank}.log" for rank in range(ranks)]
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.processes: list[subprocess.Popen[str]] = []
        for rank, log in enumerate(self.logs):
            env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                PARENT_VARIABLE: str(os.getpid()),
            }
            # A session of its own: Ctrl-C must reach a rank once, through us, and not a second time from the terminal.
            if rank == 0:
                process = subprocess.Popen(
                    command,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
                self.reader = threading.Thread(
                    target=self._pass_on, args=(process.stdout,), daemon=True
                )
                self.reader.start()
            else:
                with log.open("w", encoding="utf-8") as out:
                    process = subprocess.Popen(
                        command,
                        env=env,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        text=True,
                        start_new_session=True,
                    )
            self.processes.append(process)

    def _pass_on(self, stream: IO[str]) -> None:
        for line in stream:
            self.tail.append(line)
            sys.stdout.write(line)
            sys.stdout.flush()

    def forward(self, number: int, _frame: FrameType | None) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        first: int | None = None
        deadline = float("inf")
        while any(process.poll() is None for process in self.processes):
            ended = [
                rank
                for rank, process in enumerate(self.processes)
                if process.poll() not in (None, EXIT_DONE)
            ]
            if ended and first is None:
                # Where several ended within one look, a real exit code says more than the signal that followed it.
                first = min(ended, key=lambda rank: self.processes[rank].returncode < 0)
                deadline = time.monotonic() + PATIENCE_S
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.05)
        self.reader.join(timeout=5)
        codes = [process.returncode for process in self.processes]
        if first is None:
            first = next((rank for rank, code in enumerate(codes) if code != EXIT_DONE), None)
        if first is None:
            return EXIT_DONE
        code = codes[first]
        if code < 0 or code == EXIT_FAILED:
            self._report(first, code)
        return code if code > 0 else EXIT_FAILED

    def _report(self, rank: int, code: int) -> None:
        how = (
            f"was ended by {signal.Signals(-code).name}"
            + (" (out of memory?)" if code == -signal.SIGKILL else "")
            if code < 0
            else f"exit code {code}"
        )
        if rank == 0:
            lines = list(self.tail)
        else:
            lines = (
                self.logs[rank]
                .read_text(encoding="utf-8", errors="replace")
                .splitlines(keepends=True)[-TAIL_LINES:]
            )
        print(
            f"\nrank {rank} failed first ({how}); its last words:\n" + "".join(lines),
            file=sys.stderr,
            flush=True,
        )

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()


def when_ended(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Call `handler` at TERM and at HUP (a closed terminal): processes in sessions of their own would go on without us.

    One that is ignored (HUP under nohup) stays so.

    Returns:
        The handlers before, to be set again.
    """
    heard = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    return {number: signal.signal(number, handler) for number in heard}


def exit_by_signal(number: int, _frame: FrameType | None) -> None:
    """A handler: an exit on which `finally` blocks run."""
    sys.exit(128 + number)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def end_with_parent() -> None:
    """In a rank that `launch_local` started: be killed when the launcher is gone (Linux)."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is not None:
        die_with(int(parent))


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent, the process of this id, is gone (Linux). A parent is the thread that started it."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)
