"""Reading ahead of need, in one process: remote ranges are fetched by a few threads, local ones are announced to the kernel.

Of remote shards, ranges that lie close are fetched as one; with a cache, whole chunks are fetched and kept on the node's
disk. What is held is bounded; what was not fetched ahead is read when it is wanted. Never changes what is read.
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
"""Ranges of a tar with at most this many bytes between them are fetched as one (a request costs more than that)."""
LARGEST = 16 << 20
"""Bytes of a fetch that more ranges may still join."""
THREADS = 8
"""Requests at once."""


class Span(NamedTuple):
    """A byte range of a shard's tar."""

    dataset: Dataset
    shard: ShardInfo
    start: int
    end: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Names it within a run."""
        return self.dataset.name, self.shard.path, self.start, self.end


@dataclass
class _Fetch:
    """One request, for some spans."""

    data: Future[bytes]
    start: int
    bytes: int
    waiting: int
    """Spans that were not taken yet."""


class ReadAhead:
    """Fetches spans before they are wanted. Of one process: threads do not survive a fork.

    Args:
        cache: where chunks of remote tars are kept, if anywhere.
        limit: most bytes that are held, or on their way.
    """

    def __init__(self, cache: ChunkCache | None, limit: int) -> None:
        self._cache, self._limit = cache, limit
        self._held: dict[tuple[str, str, int, int], _Fetch] = {}
        self._bytes = 0
        self._jobs: queue.SimpleQueue[tuple[Future[bytes], Callable[[], bytes]]] = (
            queue.SimpleQueue()
        )
        self._threads = 0
        self._chunk_locks = [threading.Lock() for _ in range(64)]

    def ask(self, now: Sequence[Span], ahead: Sequence[Span] = ()) -> None:
        """Says which spans are wanted now and which ones next; everything else that is held is dropped."""
        wanted = {span.key for span in (*now, *ahead)}
        for key in [key for key in self._held if key not in wanted]:
            self._release(key)
        for spans in (now, ahead):
            self._start(
                [
                    span
                    for span in spans
                    if span.dataset.remote is not None and span.key not in self._held
                ]
            )
        announce([span for span in ahead if span.dataset.remote is None])

    def take(self, span: Span) -> bytes | None:
        """The bytes of a span, or None: it is local, was not fetched, or could not be (read it directly then)."""
        held = self._held.get(span.key)
        try:
            if held is not None:
                data = held.data.result()
                return data[span.start - held.start : span.end - held.start]
            return (
                self._cached(span)
                if span.dataset.remote is not None and self._cache is not None
                else None
            )
        except OSError:
            return None
        finally:
            self._release(span.key)

    def distrust(self, span: Span) -> None:
        """A part in this span failed its CRC-32: no copy of it is kept."""
        if self._cache is not None:
            for key, _, _ in _chunks(span):
                self._cache.forget(key)

    def _start(self, spans: Sequence[Span]) -> None:
        for group in ([span] for span in spans) if self._cache is not None else coalesce(spans):
            start, end = group[0].start, max(span.end for span in group)
            if self._held and self._bytes + end - start > self._limit:
                return
            whole = Span(group[0].dataset, group[0].shard, start, end)
            fetch = _Fetch(
                self._submit(partial(self._fetch, whole)),
                start,
                end - start,
                len({s.key for s in group}),
            )
            self._bytes += fetch.bytes
            self._held |= dict.fromkeys((span.key for span in group), fetch)

    def _release(self, key: tuple[str, str, int, int]) -> None:
        fetch = self._held.pop(key, None)
        if fetch is not None:
            fetch.waiting -= 1
            if not fetch.waiting:
                self._bytes -= fetch.bytes
                fetch.data.cancel()

    def _fetch(self, span: Span) -> bytes:
        return (
            self._cached(span)
            if self._cache is not None
            else span.dataset.read_tar(span.shard, span.start, span.end)
        )

    def _cached(self, span: Span) -> bytes:
        assert self._cache is not None
        pieces = []
        for key, first, place in _chunks(span):
            piece = self._cache.get(key, place.start, place.stop)
            if piece is None:
                with self._chunk_locks[
                    int(key[:8], 16) % len(self._chunk_locks)
                ]:  # neighbours want the same chunk: fetch it once
                    piece = self._cache.get(key, place.start, place.stop)
                    if piece is None:
                        whole = span.dataset.read_tar(
                            span.shard, first, min(first + CHUNK, span.shard.bytes)
                        )
                        self._cache.put(key, whole)
                        piece = whole[place.start : place.stop]
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
            except BaseException as error:  # whoever takes it sees it
                future.set_exception(error)


def coalesce(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans of one tar that lie close, together, each group in the order of the tar; groups in the order of their first wanted span."""
    rank = {span.key: number for number, span in reversed(list(enumerate(spans)))}
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.key):
        last = groups[-1] if groups else None
        if last is not None and last[0].key[:2] == span.key[:2]:
            end = max(s.end for s in last)
            if span.start <= end + GAP and max(end, span.end) - last[0].start <= LARGEST:
                last.append(span)
                continue
        groups.append([span])
    yield from sorted(groups, key=lambda group: min(rank[span.key] for span in group))


def announce(spans: Sequence[Span]) -> None:
    """Asks the kernel to read local ranges into its page cache, in the background (no help, and no harm, on disks that cannot)."""
    by_tar: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        by_tar.setdefault(span.key[:2], []).append(span)
    for group in by_tar.values():
        with contextlib.suppress(OSError):  # whoever reads it reports it
            descriptor = os.open(group[0].dataset.tar_path(group[0].shard), os.O_RDONLY)
            try:
                for span in group:
                    os.posix_fadvise(
                        descriptor, span.start, span.end - span.start, os.POSIX_FADV_WILLNEED
                    )
            finally:
                os.close(descriptor)


def _chunks(span: Span) -> Iterator[tuple[str, int, range]]:
    """(key, offset in the tar, range within the chunk) of the chunks that a span touches."""
    for number in range(span.start // CHUNK, -(-span.end // CHUNK)):
        first = number * CHUNK
        name = hashlib.sha256(
            f"{span.shard.sha256} {span.shard.bytes} {number}".encode()
        ).hexdigest()[:40]
        yield name, first, range(max(span.start - first, 0), min(span.end - first, CHUNK))
