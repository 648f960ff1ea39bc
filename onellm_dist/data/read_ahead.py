"""Reading ahead within one process: threads fetch remote ranges, the kernel local ones.

Neighbouring ranges of a remote shard are fetched together; with a cache, complete chunks are
fetched and kept on the node's disk. The amount of data held is bounded. Whatever was not fetched
ahead is read when it is needed, so reading ahead never changes what is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from onellm_dist.data.cache import CHUNK, ChunkCache
from onellm_dist.shards.format.dataset import Dataset, ShardInfo

GAP = 256 << 10
"""Ranges of a tar with at most this many bytes between them are fetched together: reading the gap
costs less than another request."""
MAX_FETCH = 16 << 20
"""Bytes of a fetch to which more ranges may still be added."""
THREADS = 8
"""Concurrent requests."""


class ByteRange(NamedTuple):
    """A range of bytes of a shard's tar."""

    dataset: Dataset
    shard: ShardInfo
    start: int
    """First byte."""
    end: int
    """The byte after the last one."""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Identifies the range within a run."""
        return self.dataset.name, self.shard.path, self.start, self.end


@dataclass
class _Fetch:
    """One request that serves several ranges."""

    data: Future[bytes]
    start: int
    bytes: int
    waiting: int
    """Ranges that were not loaded yet."""


class ReadAhead:
    """Fetches ranges before they are needed.

    An object serves one process, because threads do not survive a fork.

    Args:
        cache: where chunks of remote tars are kept; None: nowhere.
        limit: maximum number of bytes held or being fetched.
    """

    def __init__(self, cache: ChunkCache | None, limit: int) -> None:
        self._cache = cache
        self._limit = limit
        self._fetches: dict[tuple[str, str, int, int], _Fetch] = {}
        self._bytes = 0
        self._jobs: queue.SimpleQueue[tuple[Future[bytes], Callable[[], bytes]]] = (
            queue.SimpleQueue()
        )
        self._threads = 0
        self._chunk_locks = [threading.Lock() for _ in range(64)]

    def request(self, now: Sequence[ByteRange], ahead: Sequence[ByteRange] = ()) -> None:
        """Start fetching ranges, and drop everything held that is not among them.

        Args:
            now: ranges that are needed now.
            ahead: ranges that are needed next.
        """
        wanted = {span.key for span in (*now, *ahead)}
        for key in [key for key in self._fetches if key not in wanted]:
            self._release(key)
        for spans in (now, ahead):
            self._start(
                [
                    span
                    for span in spans
                    if span.dataset.remote is not None and span.key not in self._fetches
                ]
            )
        advise_kernel([span for span in ahead if span.dataset.remote is None])

    def load(self, span: ByteRange) -> bytes | None:
        """Return a range's bytes and release them.

        Returns:
            None if the range is local, was not fetched, or could not be; read it directly then.
        """
        fetch = self._fetches.get(span.key)
        try:
            if fetch is not None:
                data = fetch.data.result()
                return data[span.start - fetch.start : span.end - fetch.start]
            if span.dataset.remote is not None and self._cache is not None:
                return self._read_cached(span)
            return None
        except (OSError, MemoryError):  # MemoryError: a thread met the limit of another sample
            return None
        finally:
            self._release(span.key)

    def discard(self, span: ByteRange) -> None:
        """Remove cached copies of a range in which a part failed its CRC-32."""
        if self._cache is not None:
            for key, _, _ in _list_chunks(span):
                self._cache.remove(key)

    def _start(self, spans: Sequence[ByteRange]) -> None:
        """Start fetches for ranges, as many as the limit allows."""
        groups = ([span] for span in spans) if self._cache is not None else coalesce(spans)
        for group in groups:
            start, end = group[0].start, max(span.end for span in group)
            if self._fetches and self._bytes + end - start > self._limit:
                return
            joined = ByteRange(group[0].dataset, group[0].shard, start, end)
            fetch = _Fetch(
                data=self._submit(partial(self._read, joined)),
                start=start,
                bytes=end - start,
                waiting=len({span.key for span in group}),
            )
            self._bytes += fetch.bytes
            self._fetches |= dict.fromkeys((span.key for span in group), fetch)

    def _release(self, key: tuple[str, str, int, int]) -> None:
        fetch = self._fetches.pop(key, None)
        if fetch is not None:
            fetch.waiting -= 1
            if not fetch.waiting:
                self._bytes -= fetch.bytes
                fetch.data.cancel()

    def _read(self, span: ByteRange) -> bytes:
        if self._cache is not None:
            return self._read_cached(span)
        return span.dataset.read_tar(span.shard, span.start, span.end)

    def _read_cached(self, span: ByteRange) -> bytes:
        assert self._cache is not None
        pieces = []
        for key, first, within in _list_chunks(span):
            piece = self._cache.get(key, within.start, within.stop)
            if piece is None:
                # Neighbouring ranges need the same chunk: fetch it once.
                with self._chunk_locks[int(key[:8], 16) % len(self._chunk_locks)]:
                    piece = self._cache.get(key, within.start, within.stop)
                    if piece is None:
                        last = min(first + CHUNK, span.shard.bytes)
                        chunk = span.dataset.read_tar(span.shard, first, last)
                        self._cache.put(key, chunk)
                        piece = chunk[within.start : within.stop]
            pieces.append(piece)
        return b"".join(pieces)

    def _submit(self, action: Callable[[], bytes]) -> Future[bytes]:
        # Not a ThreadPoolExecutor: its threads finish their queue before a process may end.
        future: Future[bytes] = Future()
        self._jobs.put((future, action))
        if self._threads < THREADS:
            self._threads += 1
            threading.Thread(target=self._work, name="read-ahead", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            future, action = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(action())
            except BaseException as error:  # raised in the thread that loads the range
                future.set_exception(error)


def coalesce(spans: Sequence[ByteRange]) -> Iterator[list[ByteRange]]:
    """Group ranges of one tar that lie close together.

    Yields:
        Groups in the order in which their first range is needed, each in the order of the tar.
    """
    rank = {span.key: number for number, span in reversed(list(enumerate(spans)))}
    groups: list[list[ByteRange]] = []
    for span in sorted(spans, key=lambda span: span.key):
        last = groups[-1] if groups else None
        if last is not None and last[0].key[:2] == span.key[:2]:
            end = max(s.end for s in last)
            if span.start <= end + GAP and max(end, span.end) - last[0].start <= MAX_FETCH:
                last.append(span)
                continue
        groups.append([span])
    yield from sorted(groups, key=lambda group: min(rank[span.key] for span in group))


def advise_kernel(spans: Sequence[ByteRange]) -> None:
    """Ask the kernel to read local ranges into its page cache in the background.

    On file systems that cannot do so this has no effect.
    """
    by_tar: dict[tuple[str, str], list[ByteRange]] = {}
    for span in spans:
        by_tar.setdefault(span.key[:2], []).append(span)
    for group in by_tar.values():
        with contextlib.suppress(OSError):  # reported when the range is read
            descriptor = os.open(group[0].dataset.tar_path(group[0].shard), os.O_RDONLY)
            try:
                for span in group:
                    os.posix_fadvise(
                        descriptor, span.start, span.end - span.start, os.POSIX_FADV_WILLNEED
                    )
            finally:
                os.close(descriptor)


def _list_chunks(span: ByteRange) -> Iterator[tuple[str, int, range]]:
    """Yield (key, offset in the tar, range within the chunk) of every chunk a range touches."""
    for number in range(span.start // CHUNK, -(-span.end // CHUNK)):
        first = number * CHUNK
        name = f"{span.shard.sha256} {span.shard.bytes} {number}"
        key = hashlib.sha256(name.encode()).hexdigest()[:40]
        yield key, first, range(max(span.start - first, 0), min(span.end - first, CHUNK))
