"""`refusals.jsonl`: starts of a run that were refused before they changed anything.

The trainer appends to it, the job script reads it. It imports nothing but the standard library.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from onellm_dist.common.run_files import REFUSALS

START_VARIABLE = "ONELLM_LOCAL_START"
"""Name of a start whose ranks `onellm train` started on this machine."""
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


def append_refusal(
    run_dir: Path,
    *,
    status: str,
    exit_code: int,
    reason: str,
    rank: int,
    start: str,
    since: float,
) -> bool:
    """Append a line, unless a rank of the same start has appended one.

    It says `time`, `status`, `exit_code`, `reason`, `rank`, `host`, `job` and `start`.

    Args:
        run_dir: the run directory; made if missing.
        status: `usage`, or `failed` where another start was still running.
        exit_code: the exit code of the refused start.
        reason: why, for people.
        rank: the rank that was refused.
        start: see `describe_start`; "" is a start of its own.
        since: lines before this time (seconds since 1970) are of other starts.

    Returns:
        Whether the line was appended.

    Raises:
        OSError: the line cannot be written.
    """
    entry = {
        "time": time.strftime(TIME_FORMAT),
        "status": status,
        "exit_code": exit_code,
        "reason": reason,
        "rank": rank,
        "host": socket.gethostname(),
        "job": describe_job(os.environ),
        "start": start,
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / REFUSALS).open("a", encoding="utf-8") as out:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(out, fcntl.LOCK_EX)
        if start and was_refused(run_dir, start, since=since):
            return False
        out.write(json.dumps(entry) + "\n")
    return True


def read_refusals(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `refusals.jsonl`, the oldest first; [] without a file."""
    try:
        text = (run_dir / REFUSALS).read_text(encoding="utf-8")
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a kill
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def describe_start(address: str, port: int, env: Mapping[str, str]) -> str:
    """Name a start: the same text on all of its ranks, and another one for every other start.

    Args:
        address: host of rank 0.
        port: where the ranks meet.
        env: environment variables.
    """
    if env.get(START_VARIABLE):
        return env[START_VARIABLE]
    if address in ("localhost", "::1") or address.startswith("127."):  # of which machine?
        address = f"{socket.gethostname()}/{address}"
    return f"{address}:{port}"


def was_refused(run_dir: Path, start: str, *, since: float) -> bool:
    """Whether a rank of a start was refused.

    Args:
        run_dir: the run directory.
        start: see `describe_start`.
        since: lines before this time (seconds since 1970) are of other starts.
    """
    return any(
        entry.get("start") == start and _parse_time(entry) >= since
        for entry in read_refusals(run_dir)
    )


def find_refusal(run_dir: Path, job: str, *, start: str, since: str) -> dict[str, Any] | None:
    """The last refusal of a start of a job.

    Args:
        run_dir: the run directory.
        job: see `describe_job`.
        start: see `describe_start`. Ranks that ssh started do not know their job: their lines count
            if they have this name.
        since: local time with its UTC offset; older lines without a job are of other starts.
    """
    earliest = _parse_time({"time": since})
    own = [
        entry
        for entry in read_refusals(run_dir)
        if entry.get("job") == job
        or (not entry.get("job") and entry.get("start") == start and _parse_time(entry) >= earliest)
    ]
    return own[-1] if own else None


def _parse_time(entry: Mapping[str, Any]) -> float:
    try:
        return datetime.strptime(str(entry.get("time")), TIME_FORMAT).timestamp()
    except ValueError:
        return 0.0


def describe_job(env: Mapping[str, str]) -> str:
    """The Slurm job and its restart count, `JOB.RESTARTS`; "" outside of a job."""
    job = env.get("SLURM_JOB_ID", "")
    return f"{job}.{int(env.get('SLURM_RESTART_COUNT') or 0)}" if job else ""
