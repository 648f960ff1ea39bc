"""Work in processes that are killed if it hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from onellm_dist.diagnostics.preflight.killable_worker import KillableWorker
from onellm_dist.diagnostics.preflight.rendezvous import TimeLimitError


def work(name: str, ranks: Sequence[int]) -> float:
    if name == "hang":
        time.sleep(1e6)
    if name == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "raise":
        raise ValueError("no route\nto host")
    return float(sum(ranks))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_work_that_hangs_crashes_or_raises_does_not_affect_the_next() -> None:
    before = set(children(os.getpid()))
    worker = KillableWorker(work)
    (server,) = set(children(os.getpid())) - before
    try:
        assert worker.run("well", [1, 2], 60) == 3.0
        with pytest.raises(TimeLimitError):
            worker.run("hang", [0], 0.001)  # also before it has begun
        assert worker.run("well", [4], 60) == 4.0
        deadline = time.monotonic() + 30
        while any(alive(process) for process in children(server)):
            assert time.monotonic() < deadline, "the one that hung is still there"
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="SIGKILL"):
            worker.run("crash", [0], 60)
        with pytest.raises(RuntimeError, match=r"^no route$"):
            worker.run("raise", [0], 60)
        assert worker.run("well", [5], 60) == 5.0
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
