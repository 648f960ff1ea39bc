"""A pool of workers: a sample that ends its worker is skipped, whatever their number."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onellm_dist.common.errors import MachineError, OneLLMError
from onellm_dist.common.workers import children, handover
from onellm_dist.common.workers import pool as worker_pool
from onellm_dist.common.workers.pool import WorkerPool
from onellm_dist.common.workers.process import IGNORED_SIGNALS
from onellm_dist.common.workers.sandbox import OutOfMemoryError, Sandbox
from onellm_dist.common.workers.words import PoolWords

LIMIT_S = 0.6
WORDS = PoolWords(
    "loader worker", "batch", "parent", "sample_seconds", "sample_mb", "use fewer workers"
)


def crash() -> None:
    ctypes.string_at(0)


def hang() -> None:
    time.sleep(3600)


def spin() -> None:
    while True:
        pass


def deadlock() -> None:
    ctypes.CDLL(None).pause()  # in C code, which no exception of Python ends


def eat_memory() -> None:
    torch.ones(1 << 31, dtype=torch.uint8)


def eat_memory_slowly() -> None:
    kept = []
    while True:
        kept.append(np.ones(1 << 24, dtype=np.uint8))


def leave() -> None:
    os._exit(3)


def end() -> None:
    sys.exit(4)


def abort() -> None:
    os.abort()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


POISON: dict[str, tuple[Callable[[], None], str]] = {
    "crash": (crash, "crashed (SIGSEGV)"),
    "abort": (abort, "crashed (SIGABRT)"),
    "hang": (hang, "took more than 0.6 s (sample_seconds)"),
    "deadlock": (deadlock, "took more than 0.6 s (sample_seconds)"),
    "spin": (spin, "took more than 0.6 s (sample_seconds)"),
    "eat": (eat_memory, "needed more than 200 MiB (sample_mb)"),
    "eat slowly": (eat_memory_slowly, "needed more than 200 MiB (sample_mb)"),
    "leave": (leave, "ended with exit code 3"),
    "end": (end, "ended with exit code 1"),
    "kill": (kill, "was killed (SIGKILL)"),
}
QUICK = ("crash", "abort", "leave", "end", "kill", "eat")


class PoisonReader:
    """Reads samples by their number; what a sample does stands in `samples`."""

    def __init__(self, samples: list[str]) -> None:
        self.samples = samples
        self.skipped: dict[str, str] = {}
        self.sandbox = Sandbox()
        self.before: Callable[[range], object] = lambda task: None
        self.during: Callable[[], object] = lambda: None
        self.bytes = 0

    def get_sample_id(self, task: range, index: int) -> str:
        return str(task[index])

    def skip(self, sample_id: str, reason: str) -> None:
        self.skipped[sample_id] = f"{sample_id}: {reason}"

    def read(self, task: range) -> Any:
        faulthandler.disable()  # pytest's; the crashes are meant
        self.before(task)
        found = []
        for index, row in enumerate(task):
            name = str(row)
            with self.sandbox.sample(index):
                self.sandbox.decode()
                if name in self.skipped:
                    found.append(self.skipped[name])
                    continue
                self.during()
                behaviour = self.samples[row]
                if behaviour in POISON:
                    try:
                        POISON[behaviour][0]()
                    except RuntimeError as error:
                        raise OutOfMemoryError(str(error)) from error
                found.append(behaviour)
        return found, torch.arange(8 + self.bytes)


def make_tasks(count: int, per_batch: int) -> Iterator[range]:
    for start in range(0, count, per_batch):
        yield range(start, min(start + per_batch, count))


def make_pool(reader: PoisonReader, per_batch: int = 1, **keys: Any) -> WorkerPool[range, Any]:
    return WorkerPool(reader, make_tasks(len(reader.samples), per_batch), WORDS, **keys)


def read_all(reader: PoisonReader, workers: int, per_batch: int = 3, **keys: Any) -> list[Any]:
    keys = {"prefetch": 2, "sample_seconds": 60.0, "sample_mb": 200} | keys
    found = []
    with closing(make_pool(reader, per_batch, workers=workers, **keys)) as pool:
        while (item := pool.next()) is not None:
            found += open_batch(reader, item[1])
    return found


def open_batch(reader: PoisonReader, batch: Any) -> list[Any]:
    if isinstance(batch, Exception):
        raise batch
    samples, tensor = batch
    assert torch.equal(tensor, torch.arange(8 + reader.bytes))
    return list(samples)


def expect(samples: list[str]) -> list[str]:
    return [
        f"{row}: its worker {POISON[name][1]}, twice" if name in POISON else name
        for row, name in enumerate(samples)
    ]


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


@pytest.mark.parametrize("name", POISON)
def test_a_sample_that_ends_its_worker_is_skipped_and_named(name: str) -> None:
    samples = ["a", "b", name, "c", "d", "e", "f", "g"]
    seconds = LIMIT_S if "sample_seconds" in POISON[name][1] else 60.0
    assert read_all(PoisonReader(samples), 2, sample_seconds=seconds) == expect(samples)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from(["good", "good", "good", *QUICK]), min_size=1, max_size=10),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_what_is_read_depends_on_the_samples_alone(
    samples: list[str], workers: int, per_batch: int
) -> None:
    assert read_all(PoisonReader(samples), workers, per_batch) == expect(samples)


def test_a_sample_that_fails_once_is_read(tmp_path: Any) -> None:
    mark = tmp_path / "seen"

    def once(task: range) -> None:
        if task.start == 3 and not mark.exists():
            mark.touch()
            reader.samples[4] = "crash"

    reader = PoisonReader(["good"] * 6)
    reader.before = once
    assert read_all(reader, 1) == ["good"] * 6
    assert mark.exists() and not reader.skipped


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_with_requests_unread_names_its_sample(workers: int) -> None:
    """The kernel reports the unread requests before the batches that the worker had sent."""
    samples = ["a", "b", "leave", "c", "crash", "d", "e", "leave", "f", "crash", "leave", "g"]
    reader = PoisonReader(samples)
    pool = make_pool(reader, workers=workers, prefetch=4)
    found = []
    with closing(pool):
        for _ in samples:
            time.sleep(0.15)  # the workers are ahead
            item = pool.next()
            assert item is not None
            found += open_batch(reader, item[1])
        assert pool.next() is None and not pool._replaced
    assert found == expect(samples)


class Native:
    """Waits for a thread when it is freed, as PyAV's scaler does; a fork has no such thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.cycle = self

    def __del__(self) -> None:
        if os.getpid() != self.pid:
            deadlock()


def test_a_worker_does_not_free_the_garbage_of_its_parent() -> None:
    def use() -> None:
        film = av.VideoFrame(64, 64, "yuv420p").reformat(96, 96, "rgb24")
        kept.append([film, kept])

    kept: list[Any] = []
    use()
    reader = PoisonReader(["good"] * 4)
    reader.before = lambda task: gc.collect()
    gc.disable()
    try:
        Native()
        kept = []
        assert read_all(reader, 2) == ["good"] * 4
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0
    gc.collect()


def test_slow_is_not_hanging() -> None:
    """Samples of a batch each have their own time, and waiting for the trainer is no time."""

    def slow(task: range) -> None:
        time.sleep(2 * LIMIT_S)  # a disk: not the sample's time

    reader = PoisonReader(["good"] * 2)
    reader.before = slow
    assert read_all(reader, 1, 1, sample_seconds=LIMIT_S) == ["good"] * 2
    pool = make_pool(PoisonReader(["good"] * 4), workers=1, prefetch=1, sample_seconds=LIMIT_S)
    with closing(pool):
        pool.next()
        time.sleep(2 * LIMIT_S)
        assert [pool.next() is None for _ in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pool_reads_other_tasks_after_its_last(workers: int) -> None:
    reader = PoisonReader(["a", "b", "crash", "c", "d", "leave", "e"])
    found = []
    with closing(make_pool(reader, 2, workers=workers, prefetch=2)) as pool:
        for tasks in ((), make_tasks(7, 3)):
            if tasks:
                pool.restart(tasks)
            while (item := pool.next()) is not None:
                found.append(open_batch(reader, item[1]))
    rows = expect(reader.samples)
    assert [row for batch in found for row in batch] == 2 * rows and len(found) == 4 + 3


def disconnect() -> None:
    """Leave the pool's connection, as a process that is ending does, and do not end."""
    os.closerange(3, 256)
    time.sleep(3600)


@pytest.mark.parametrize("name", ["disconnect", "spin"])
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
    for process in psutil.Process().children():
        os.kill(process.pid, number)


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


def test_a_batch_that_cannot_be_pickled_is_no_lack_of_memory() -> None:
    reader = PoisonReader(["good"] * 2)
    reader.samples[1] = lambda: None  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match=r"in a loader worker(.|\n)*lambda"):
        read_all(reader, 1, 1)


def test_a_sample_that_prints_where_nobody_reads_is_read() -> None:
    """A worker that waited for room in a pipe would seem to hang."""
    unread, full = os.pipe()
    before = os.dup(2)
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, b"x")
    os.set_blocking(full, True)

    libc = ctypes.CDLL(None)
    reader = PoisonReader(["good"] * 3)
    reader.during = lambda: libc.write(2, b"a warning", 9)
    os.dup2(full, 2)
    try:
        assert read_all(reader, 1, 1, sample_seconds=LIMIT_S) == ["good"] * 3
    finally:
        os.dup2(before, 2)
        for descriptor in (unread, full, before):
            os.close(descriptor)


def test_errors_arrive_as_what_they_are() -> None:
    def fail(task: range) -> None:
        if task.start == 1:
            raise OneLLMError("what", "why", "do")

    reader = PoisonReader(["good"] * 3)
    reader.before = fail
    with pytest.raises(OneLLMError) as info:
        read_all(reader, 2, 1)
    assert (info.value.what, info.value.why, info.value.do) == ("what", "why", "do")
    reader.before = lambda task: {-1: None}[task.start]
    with pytest.raises(RuntimeError, match="KeyError"):
        read_all(reader, 2, 1)


def test_a_batch_larger_than_any_pipe_arrives_and_leaves_nothing_in_shared_memory() -> None:
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    reader = PoisonReader(["good"] * 6)
    reader.bytes = 1 << 21
    assert read_all(reader, 2, 1) == ["good"] * 6
    assert not os.path.isdir("/dev/shm") or set(os.listdir("/dev/shm")) <= before


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
import test_worker_pool as t
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
        [sys.executable, "-c", ORPHAN, os.path.dirname(__file__), name],
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
