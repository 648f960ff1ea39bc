"""The node-local cache: complete chunks, never above its limit, safe from kills and full disks."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from onellm_dist.common.errors import UsageError
from onellm_dist.data import cache as cache_module
from onellm_dist.data.cache import ChunkCache

SIZE = 1000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "CHUNK", SIZE)


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:40]


def chunk(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def test_chunks_are_read_by_range(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path / "node", 10 * SIZE)
    assert cache.get(key(1), 0, 10) is None
    assert cache.put(key(1), chunk(1))
    assert cache.get(key(1), 0, SIZE) == chunk(1)
    assert cache.get(key(1), 17, 400) == chunk(1)[17:400]
    assert ChunkCache(tmp_path / "node", 10 * SIZE).get(key(1), 0, 5) == chunk(1)[:5]
    cache.remove(key(1))
    assert cache.get(key(1), 0, 10) is None


def test_a_chunk_that_is_cut_short_counts_as_missing(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 10 * SIZE)
    cache.put(key(1), chunk(1))
    path = next(path for path in (tmp_path / "chunks").rglob("*") if path.is_file())
    path.write_bytes(chunk(1)[:300])
    assert cache.get(key(1), 200, 400) is None
    assert cache.get(key(1), 100, 300) == chunk(1)[100:300]


def test_the_limit_holds_and_the_oldest_chunks_go_first(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 10 * SIZE)
    for number in range(10):
        cache.put(key(number), chunk(number))
        path = tmp_path / "chunks" / key(number)[:2] / key(number)
        os.utime(path, (number, number))
    assert cache.get(key(0), 0, 1) is not None  # used just now: the most recent
    for number in range(10, 25):
        cache.put(key(number), chunk(number))
        assert cache.count_bytes() <= 10 * SIZE
        if number == 10:
            assert cache.get(key(0), 0, SIZE) == chunk(0)
            assert cache.get(key(1), 0, 1) is None
    assert cache.count_bytes() >= 8 * SIZE


def work(folder: Path, seed: int, seconds: float) -> None:
    cache, draw, end = (
        ChunkCache(folder, 10 * SIZE),
        random.Random(seed),
        time.monotonic() + seconds,
    )
    while time.monotonic() < end:
        number = draw.randrange(30)
        found = cache.get(key(number), 0, SIZE)
        assert found is None or found == chunk(number)
        if found is None:
            cache.put(key(number), chunk(number))
        elif draw.random() < 0.05:
            cache.remove(key(number))


@pytest.mark.slow
def test_processes_share_it_and_kills_leave_it_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four processes at once, one killed repeatedly: never a wrong chunk, never above the limit."""
    ChunkCache(tmp_path, 10 * SIZE)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(tmp_path, seed, 4.0)) for seed in range(3)]
    for worker in workers:
        worker.start()
    watching, draw = ChunkCache(tmp_path, 10 * SIZE), random.Random(9)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        victim = context.Process(target=work, args=(tmp_path, draw.randrange(1000), 60.0))
        victim.start()
        time.sleep(draw.uniform(0.02, 0.15))
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        assert watching.count_bytes() <= 10 * SIZE
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    for number in range(100, 120):  # space is freed again, including what killed processes left
        watching.put(key(number), chunk(number))
    assert watching.count_bytes() <= 10 * SIZE


def test_a_full_disk_only_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ChunkCache(tmp_path, 10 * SIZE)

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert not cache.put(key(1), chunk(1))
    monkeypatch.undo()
    assert cache.get(key(1), 0, 1) is None
    assert cache.put(key(1), chunk(1))


def test_a_useless_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.cache_gb"):
        ChunkCache(tmp_path, SIZE)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"data\.cache_dir"):
        ChunkCache(tmp_path / "file", 10 * SIZE)
