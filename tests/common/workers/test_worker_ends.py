"""Workers that die, are killed or do not end: who is held responsible, and what is left."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import poison_reader
import psutil
import pytest
from forked import forked_children
from poison_reader import (
    LIMIT_S,
    POISON,
    PoisonReader,
    expect,
    make_pool,
    read_all,
)

from onellm_dist.common.errors import MachineError
from onellm_dist.common.workers import children, handover
from onellm_dist.common.workers import pool as worker_pool
from onellm_dist.common.workers.pool import WorkerPool
from onellm_dist.common.workers.process import IGNORED_SIGNALS


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


def disconnect() -> None:
    """Leave the pool's connection, as a process that is ending does, and do not end."""
    os.closerange(3, 256)
    time.sleep(3600)


@pytest.mark.parametrize("name", ["disconnect", "spin"])
@pytest.mark.seconds
def test_a_worker_that_does_not_end_is_not_waited_for_for_ever(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was killed while it waits for a disk: signals do not reach it."""
    monkeypatch.setitem(POISON, "disconnect", (disconnect, ""))
    pids = set[int]()
    reader = PoisonReader(["good", name, "good"])
    with monkeypatch.context() as patch:
        patch.setattr(worker_pool, "END_S", 0.5)
        patch.setattr(worker_pool, "CLOSE_S", 0.1)
        patch.setattr(children, "kill", pids.add)
        started = time.monotonic()
        with pytest.raises(MachineError, match="was killed and has not ended") as info:
            read_all(reader, 1, 1, sample_seconds=LIMIT_S)
    (pid,) = pids
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert time.monotonic() - started < 15
    assert f"process {pid}" in info.value.what and not reader.skipped


def kill_workers(number: int = signal.SIGKILL) -> None:
    for process in forked_children():
        os.kill(process.pid, number)


@pytest.mark.seconds
def test_workers_killed_from_outside_are_replaced_and_then_the_run_ends() -> None:
    reader = PoisonReader(["good"] * 60)
    pool = make_pool(reader, workers=1, prefetch=1)
    with closing(pool):
        for killed in range(worker_pool.MOST_REPLACED):
            assert pool.next() is not None, killed
            wait_for_idle(pool)
            kill_workers()
            pool.next()  # read before the worker was killed
            assert pool.next() is not None
        wait_for_idle(pool)
        kill_workers()
        pool.next()
        with pytest.raises(MachineError, match=r"was killed \(SIGKILL\), and 3 others"):
            pool.next()
    assert not reader.skipped


def wait_for_idle(pool: WorkerPool[range, Any]) -> None:
    """Until every worker has handed over what it was asked for."""
    deadline = time.monotonic() + 10
    while any(w.pending for w in pool._workers) and time.monotonic() < deadline:
        pool._receive(0.05)


def test_a_worker_killed_for_memory_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel chose it; the sample that it was reading need not be large."""
    count = iter([0, 1, 1, 1])
    monkeypatch.setattr(worker_pool, "count_kills_for_memory", lambda: next(count))
    reader = PoisonReader(["good", "kill", "good"])
    with pytest.raises(MachineError, match="out of memory") as info:
        read_all(reader, 1)
    assert not reader.skipped and "use fewer workers" in info.value.do


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOSPC, errno.EMFILE])
def test_a_batch_that_cannot_be_handed_over_ends_the_run_with_the_cause(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, parent = handover.create_memory, os.getpid()
    failed: list[int] = []

    def fail() -> int:
        if os.getpid() != parent and not failed:
            failed.append(1)
            raise OSError(number, os.strerror(number))
        return create()

    monkeypatch.setattr(handover, "create_memory", fail)
    reader = PoisonReader(["good"] * 4)
    started = time.monotonic()
    with pytest.raises(MachineError, match=os.strerror(number)) as info:
        read_all(reader, 2)
    assert time.monotonic() - started < 10 and not reader.skipped
    assert "cannot hand its batch" in info.value.what and "ulimit" in info.value.do


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGABRT])
def test_a_worker_that_dies_while_it_hands_over_ends_the_run(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, parent = handover.create_memory, os.getpid()

    def die() -> int:
        if os.getpid() != parent:
            faulthandler.disable()
            os.kill(os.getpid(), number)
        return create()

    monkeypatch.setattr(handover, "create_memory", die)
    with pytest.raises(MachineError, match=f"crashed .{signal.Signals(number).name}"):
        read_all(PoisonReader(["good"] * 4), 2)


def test_a_child_of_a_decoder_does_not_keep_a_dead_worker_alive(tmp_path: Path) -> None:
    """What a decoder started may hold the worker's socket open."""

    def start_child(task: range) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / str(child)).touch()

    reader = PoisonReader(["leave", "good"])
    reader.before = start_child
    started = time.monotonic()
    try:
        assert read_all(reader, 1, 1)[0] == expect(["leave"])[0]
        assert time.monotonic() - started < 30
    finally:
        for path in tmp_path.iterdir():
            os.kill(int(path.name), signal.SIGKILL)


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 0.1], ids=["idle", "busy"])
def test_workers_whose_batches_nobody_took_end_without_a_word(
    killed: bool,
    seconds: float,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes: list[int] = []
    reap = os.waitpid

    def wait(pid: int, options: int) -> tuple[int, int]:
        found = reap(pid, options)
        if found[0]:
            codes.append(os.waitstatus_to_exitcode(found[1]))
        return found

    monkeypatch.setattr(os, "waitpid", wait)
    if not killed:
        monkeypatch.setattr(children, "kill", lambda pid: None)
    reader = PoisonReader(["good"] * 12)
    reader.before = lambda task: time.sleep(seconds)
    pool = make_pool(reader, workers=2, prefetch=6)
    time.sleep(0.25)
    pool.close()
    assert codes == [-signal.SIGKILL if killed else 0] * 2
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(PoisonReader(["deadlock"]), workers=1, prefetch=1)
    (worker,) = pool._workers
    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(worker_pool, "CLOSE_S", 0.2)
        patch.setattr(children, "kill", lambda pid: None)  # as in an uninterruptible call
        pool.close()
    assert time.monotonic() - started < 5
    os.kill(worker.pid, signal.SIGKILL)
    os.waitpid(worker.pid, 0)


ORPHAN = """
import os, signal, sys, time
sys.path[:0] = sys.argv[1:2]
import psutil
import poison_reader as t
reader = t.PoisonReader([sys.argv[2]] * 4)
pool = t.make_pool(reader, workers=2, prefetch=1)
time.sleep(0.5)
print(*(p.pid for p in psutil.Process().children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deadlock", "spin"])
def test_workers_end_with_their_parent_even_inside_a_decoder(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, os.path.dirname(poison_reader.__file__), name],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_signals_to_workers_change_nothing() -> None:
    def signal_itself(task: range) -> None:
        for number in IGNORED_SIGNALS:
            os.kill(os.getpid(), number)

    reader = PoisonReader(["good"] * 4)
    reader.before = signal_itself
    assert read_all(reader, 2, 1) == ["good"] * 4
