"""Ranks on this machine: start them, pass signals on, and report which one failed first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, UsageError
from onellm_dist.common.logging import get_logger, write_unless_blocked
from onellm_dist.common.processes import kill_with_parent
from onellm_dist.launch.rank_logs import LOG_VARIABLE

PARENT_VARIABLE = "ONELLM_LOCAL_PARENT"
"""Id of the process that a local rank must end with."""
FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE_S = 20.0
"""Seconds that the other ranks have to end by themselves after one has failed."""
TAIL_LINES = 60

logger = get_logger(__name__)


def launch_local(
    command: Sequence[str],
    ranks: int,
    logs: Path,
    env: Mapping[str, str] | None = None,
    *,
    independent: bool = False,
) -> int:
    """Run `command` once per rank on this machine and wait for all of them.

    Rank 0's output is passed through; the others write to `logs/rank-N.log`. USR1, TERM, INT and
    HUP (unless `nohup` has it ignored) are forwarded to every rank. If a rank fails, its output is
    shown and the others are ended, unless they are independent.

    Args:
        command: what each rank runs.
        ranks: number of ranks.
        logs: folder of the ranks' output; made if missing.
        env: their environment, to which the variables of a launcher are added; default: that of
            this process.
        independent: whether each rank continues when another one has failed.

    Returns:
        0, or the exit code of the first rank that failed (1 if a signal ended it).

    Raises:
        UsageError: `logs` cannot be created.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{logs} cannot be created: {error.strerror or error}",
            "the ranks' output and everything else of the run goes there.",
            "choose a run.dir where you may write.",
        ) from None
    group = _LocalRanks(command, ranks, logs, os.environ if env is None else env)
    before = {
        number: signal.signal(number, group.forward)
        for number in FORWARDED
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        return group.wait(float("inf") if independent else PATIENCE_S)
    finally:
        group.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


class _LocalRanks:
    """The processes of one start, in the order of their ranks."""

    def __init__(
        self, command: Sequence[str], ranks: int, logs: Path, env: Mapping[str, str]
    ) -> None:
        self._logs = [logs / f"rank-{rank}.log" for rank in range(ranks)]
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        port = find_free_port()
        environments = [_make_environment(env, rank, ranks, port) for rank in range(ranks)]
        for log, environment in zip(self._logs[1:], environments[1:], strict=True):
            environment[LOG_VARIABLE] = str(log)
        # Each rank has its own session: Ctrl-C must reach it once, through us, and not a second
        # time from the terminal.
        self._first = subprocess.Popen(
            command,
            env=environments[0],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._pass_output_on, daemon=True)
        self._reader.start()
        self._processes = [self._first]
        for log, environment in zip(self._logs[1:], environments[1:], strict=True):
            with log.open("w", encoding="utf-8") as out:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            self._processes.append(process)

    def _pass_output_on(self) -> None:
        """Pass rank 0's output on; a terminal that is gone or blocks does not hold up the rank."""
        assert self._first.stdout is not None
        for line in self._first.stdout:
            self._tail.append(line)
            write_unless_blocked(sys.stdout, line)

    def forward(self, number: int, _frame: FrameType | None) -> None:
        """Send a signal to every rank that still runs (a signal handler)."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, patience_s: float) -> int:
        """Wait for all ranks; returns the exit code of `launch_local`."""
        first: int | None = None
        deadline = float("inf")
        while any(process.poll() is None for process in self._processes):
            failed = [
                rank
                for rank, process in enumerate(self._processes)
                if process.poll() not in (None, EXIT_DONE)
            ]
            if failed and first is None:
                # Of several that ended between two polls, one with an exit code of its own says
                # more than one ended by the signal that followed.
                first = min(failed, key=lambda rank: self._processes[rank].returncode < 0)
                deadline = time.monotonic() + patience_s
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.05)
        self._reader.join(timeout=5)
        codes = [process.returncode for process in self._processes]
        if first is None:
            first = next((rank for rank, code in enumerate(codes) if code != EXIT_DONE), None)
        if first is None:
            return EXIT_DONE
        code = codes[first]
        if code < 0 or code == EXIT_FAILED or (first > 0 and code == EXIT_USAGE):
            self._report(first, code)
        return code if code > 0 else EXIT_FAILED

    def _report(self, rank: int, code: int) -> None:
        how = f"exit code {code}"
        if code < 0:
            how = f"ended by {signal.Signals(-code).name}"
            how += " (out of memory?)" if code == -signal.SIGKILL else ""
        if rank == 0:
            lines = list(self._tail)
        else:
            text = self._logs[rank].read_text(encoding="utf-8", errors="replace")
            lines = text.splitlines(keepends=True)[-TAIL_LINES:]
        logger.error("rank %d failed first (%s); its last output:\n%s", rank, how, "".join(lines))

    def kill(self) -> None:
        """Kill the ranks that still run, and wait for all of them."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()


def _make_environment(env: Mapping[str, str], rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        **env,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT_VARIABLE: str(os.getpid()),
    }


def handle_termination(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Call `handler` on TERM and on HUP (a closed terminal).

    Child processes in their own sessions would otherwise outlive this one. A signal that is ignored
    (HUP under nohup) stays ignored.

    Returns:
        The handlers before, by signal number.
    """
    handled = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    return {number: signal.signal(number, handler) for number in handled}


def exit_by_signal(number: int, _frame: FrameType | None) -> None:
    """Exit so that `finally` blocks run (a signal handler)."""
    sys.exit(128 + number)


def find_free_port() -> int:
    """Find a TCP port of this machine that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def end_with_parent() -> None:
    """In a rank of `launch_local`, ask to be killed when the launcher ends (Linux)."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is not None:
        kill_with_parent(int(parent))
