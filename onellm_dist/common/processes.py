"""Child processes: they cannot outlive their parent, and what the kernel says about them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""`prctl` option: the signal that this process gets when its parent ends (linux/prctl.h)."""


def kill_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent, process `parent`, ends.

    To the kernel the parent is the thread that started this process, not the whole process. The
    signal is SIGKILL, so a process that hangs in C code ends too.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def make_module_command(module: str, *arguments: str) -> list[str]:
    """A command that runs a module of this package in a new Python.

    `python -m` looks for every module in the working directory first, so that a `random.py` there
    takes the place of Python's own. Here the working directory is no place to look; the folder that
    holds this package is the last one. Use `make_safe_environment` for its environment.
    """
    root = str(Path(__file__).resolve().parents[2])
    code = (
        "import sys\n"
        "if sys.path[:1] == ['']: del sys.path[0]\n"
        f"sys.path.append({root!r})\n"
        "import runpy\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-u", "-c", code, *arguments]


def make_safe_environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process whose own Python children do not look in its folder either.

    Python 3.11 and later read `PYTHONSAFEPATH`.
    """
    return {"PYTHONSAFEPATH": "1", **env}


def get_cpu_seconds(pid: int) -> float:
    """CPU time of another process, all of its threads together.

    Raises:
        OSError: it does not exist.
    """
    # The id of a process's CPU clock, as the C library's clock_getcpuclockid computes it.
    return time.clock_gettime((~pid << 3) | 2)


def is_asleep(pid: int) -> bool:
    """Whether a process waits for something other than a disk or the processor."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "S"


def count_kills_for_memory() -> int:
    """How many processes the kernel has killed for lack of memory, on the machine and in our group.

    Only the difference of two counts means anything.
    """
    count = 0
    for path in (*_find_memory_events(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError):
            fields = dict(line.split()[:2] for line in path.read_text("utf-8").splitlines())
            count += int(fields.get("oom_kill", 0))
    return count


def _find_memory_events() -> list[Path]:
    """Where control groups of version 2 or 1 count those kills."""
    root = Path("/sys/fs/cgroup")
    found = [root / "memory.events", root / "memory" / "memory.oom_control"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                found.append(root / path.lstrip("/") / "memory.events")
            elif controllers == "memory":
                found.append(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return list(dict.fromkeys(found))
