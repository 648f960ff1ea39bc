"""Ending child processes, without waiting for ever for one that cannot end."""

from __future__ import annotations

import contextlib
import os
import signal
import time


def has_ended(pid: int) -> bool:
    """Check whether a child has ended; it can still be waited for."""
    try:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, pid, options) is not None
    except ChildProcessError:
        return True


def kill(pid: int) -> None:
    """Kill a process, if it exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def reap(pid: int) -> bool:
    """Check whether a child has ended and needs no more waiting for."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # somebody else has waited for it
        return True


def wait(pid: int, seconds: float) -> int | None:
    """Wait for a child that has ended or is about to.

    Returns:
        Its exit code, negative for the signal that ended it; None: it has not ended by then.
    """
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while True:
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # somebody else has waited for it
            return 1
        if found == pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
