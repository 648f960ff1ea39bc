"""A function applied to samples in worker processes, each sample within its limits.

The function comes to the workers by the fork, so it may be any; samples and results are pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from onellm_dist.common.workers.pool import WorkerPool
from onellm_dist.common.workers.sandbox import SAMPLE_MB, SAMPLE_SECONDS, Sandbox
from onellm_dist.common.workers.words import PoolWords

PREFETCH = 3
"""Chunks of samples that each worker is given ahead."""

Sample = TypeVar("Sample")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class SampleFunction(Generic[Sample, Outcome]):
    """What is done with every sample."""

    apply: Callable[[Sample], Outcome]
    """Called in a worker. What it decodes, it decodes within `sandbox.decoding`."""
    refuse: Callable[[Sample, str], Outcome]
    """Called in a worker instead, with the reason, for a sample that ended its worker twice."""
    get_name: Callable[[Sample], str]
    """What a message calls the sample."""


@dataclass(frozen=True)
class SampleLimits:
    """What one sample may take."""

    seconds: float = SAMPLE_SECONDS
    """CPU time, or time asleep, that it may take to decode; 0: any."""
    megabytes: int = SAMPLE_MB
    """Memory in MiB that it may need; 0: any."""


@dataclass(frozen=True)
class _Chunk(Generic[Sample]):
    """Some samples, and the number of the first in the life of the pool."""

    first: int
    samples: list[Sample]


@dataclass(frozen=True)
class _SampleId:
    """A sample by its number: names need not be unique."""

    number: int
    name: str

    def __str__(self) -> str:
        return self.name


class _ChunkReader(Generic[Sample, Outcome]):
    """What the workers read with."""

    def __init__(self, function: SampleFunction[Sample, Outcome]) -> None:
        self.sandbox = Sandbox()
        self._function = function
        self._refused: dict[int, str] = {}

    def read(self, task: _Chunk[Sample]) -> list[Outcome]:
        """Apply the function to every sample."""
        found = []
        for index, sample in enumerate(task.samples):
            reason = self._refused.get(task.first + index)
            if reason is not None:
                found.append(self._function.refuse(sample, reason))
                continue
            with self.sandbox.sample(index):
                found.append(self._function.apply(sample))
        return found

    def get_sample_id(self, task: _Chunk[Sample], index: int) -> _SampleId:
        """Return what names a sample."""
        return _SampleId(task.first + index, self._function.get_name(task.samples[index]))

    def skip(self, sample_id: _SampleId, reason: str) -> None:
        """Refuse a sample from now on."""
        self._refused[sample_id.number] = reason


class SamplePool(Generic[Sample, Outcome]):
    """Applies a function to samples in worker processes; they start with the first samples.

    Args:
        function: what is done with every sample.
        words: what workers and limits are called in messages.
        limits: what one sample may take.
        workers: number of processes, at least 1.
        chunk: samples that a worker receives at once.
    """

    def __init__(
        self,
        function: SampleFunction[Sample, Outcome],
        words: PoolWords,
        limits: SampleLimits,
        *,
        workers: int = 1,
        chunk: int = 1,
    ) -> None:
        self._function = function
        self._words = words
        self._limits = limits
        self._workers = workers
        self._chunk = chunk
        self._pool: WorkerPool[_Chunk[Sample], list[Outcome]] | None = None
        self._listed = 0

    def map(self, samples: Iterable[Sample]) -> Generator[Outcome]:
        """Yield the outcome of each sample, in order.

        Raises:
            OneLLMError: what the function raised.
            MachineError: as of `WorkerPool.next`.
        """
        complete = False
        try:
            pool = self._start(self._cut(samples))
            while (item := pool.next()) is not None:
                if isinstance(item[1], Exception):
                    raise item[1]
                yield from item[1]
            complete = True
        finally:
            if not complete:
                self.close()

    def close(self) -> None:
        """End the workers; they start anew with the next samples."""
        pool = self._pool
        self._pool = None
        if pool is not None:
            pool.close()

    def _cut(self, samples: Iterable[Sample]) -> Iterator[_Chunk[Sample]]:
        left = iter(samples)
        while chunk := list(islice(left, self._chunk)):
            yield _Chunk(self._listed, chunk)
            self._listed += len(chunk)

    def _start(self, chunks: Iterator[_Chunk[Sample]]) -> WorkerPool[_Chunk[Sample], list[Outcome]]:
        if self._pool is not None:
            self._pool.restart(chunks)
            return self._pool
        self._pool = WorkerPool(
            _ChunkReader(self._function),
            chunks,
            self._words,
            workers=self._workers,
            prefetch=PREFETCH,
            sample_seconds=self._limits.seconds,
            sample_mb=self._limits.megabytes,
        )
        return self._pool
