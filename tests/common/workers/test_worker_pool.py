"""A pool of workers: a sample that ends its worker is skipped, whatever their number."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import av
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from poison_reader import (
    LIMIT_S,
    POISON,
    QUICK,
    PoisonReader,
    deadlock,
    expect,
    make_pool,
    make_tasks,
    open_batch,
    read_all,
)

from onellm_dist.common.errors import OneLLMError


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


@pytest.mark.parametrize("name", POISON)
@pytest.mark.seconds
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
@pytest.mark.seconds
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


@pytest.mark.seconds
def test_a_worker_does_not_free_the_garbage_of_its_parent() -> None:
    def use() -> None:
        film = av.VideoFrame(64, 64, "yuv420p").reformat(96, 96, "rgb24")
        kept.append([film, kept])

    kept: list[Any] = []
    use()
    reader = PoisonReader(["good"] * 4)
    reader.before = lambda task: gc.collect()
    frozen = gc.get_freeze_count()
    gc.disable()
    try:
        Native()
        kept = []
        assert read_all(reader, 2) == ["good"] * 4
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert gc.get_freeze_count() == frozen  # the parent collects its garbage as before
    gc.collect()


def test_no_collection_starts_while_a_worker_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        found.append(gc.isenabled())
        return real()

    def check(task: range) -> None:
        assert gc.isenabled()

    real, found = os.fork, list[bool]()
    monkeypatch.setattr(os, "fork", fork)
    reader = PoisonReader(["good"] * 4)
    reader.before = check
    assert read_all(reader, 2) == ["good"] * 4
    assert found and not any(found) and gc.isenabled()


def test_slow_is_not_hanging() -> None:
    """Samples of a batch each have their own time, and waiting for the trainer does not count."""

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
@pytest.mark.seconds
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
