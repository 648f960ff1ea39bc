"""Writes the toy world's datasets: one folder a modality, each with the splits train, test_seen and test_held_out.

Workers only render; one process writes, in order, so the bytes on disk do not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.progress import Progress, progress
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.shards.sources.base import BuildReport
from onellm_dist.shards.sources.toyworld import draws, world
from onellm_dist.shards.sources.toyworld.render import ToySample, render_sample

TRAIN, TEST = 2000, 120
"""Samples of train, and of each test split, where nothing else is asked for."""
_SHARD_SAMPLES = 500
_CHUNK = 16
"""Samples a worker renders at once."""
_WINDOW = 4
"""Chunks in flight a worker: bounds the memory of samples that wait for their turn."""


class _Chunk(NamedTuple):
    """A run of samples of one split."""

    modality: str
    split: str
    start: int
    stop: int
    seed: int


def build_toyworld(
    out: Path,
    *,
    seed: int = 0,
    train_per_modality: int | Mapping[str, int] = TRAIN,
    test_per_modality: int | Mapping[str, int] = TEST,
    modalities: Sequence[str] = world.MODALITIES,
    workers: int = 1,
) -> BuildReport:
    """Build the datasets `out/image`, `out/video`, ... .

    Args:
        out: the folder they go to; none of them may exist.
        seed: other renderings, in another order. Which combinations are held out does not depend on it.
        train_per_modality: samples of `train`, one number or one a modality (the default for those not named).
        test_per_modality: samples of `test_seen` and of `test_held_out`, likewise.
        modalities: which of them to build.
        workers: processes that render.

    Raises:
        UsageError: an unknown modality, a number below 1, or an output that is occupied.
    """
    for modality in (*modalities, *_names(train_per_modality), *_names(test_per_modality)):
        world.get_scenes(modality)
    chunks: list[_Chunk] = []
    for modality in modalities:
        train, test = (
            _count(train_per_modality, modality, TRAIN),
            _count(test_per_modality, modality, TEST),
        )
        for split, count in zip(draws.DATASET_SPLITS, (train, test, test), strict=True):
            chunks += [
                _Chunk(modality, split, i, min(i + _CHUNK, count), seed)
                for i in range(0, count, _CHUNK)
            ]
    total = sum(c.stop - c.start for c in chunks)
    with ExitStack() as stack:
        samples = stack.enter_context(_Renderer(workers)).in_order(chunks)
        bar: Progress[int] = stack.enter_context(
            progress(total, "Building the toy world", unit="samples")
        )
        for modality in modalities:
            _write(
                out / modality,
                modality,
                seed,
                samples,
                sum(c.modality == modality for c in chunks),
                bar,
            )
    return BuildReport(
        total,
        notes=tuple(
            line for line in world.describe().splitlines() if line.split(":")[0] in modalities
        ),
    )


def _write(
    folder: Path,
    modality: str,
    seed: int,
    samples: Iterator[tuple[_Chunk, list[ToySample]]],
    chunks: int,
    bar: Progress[int],
) -> None:
    """One modality's dataset: the next `chunks` results of `samples`."""
    scene = world.get_scenes(modality)
    about = {
        "seed": seed,
        "attributes": {name: list(values) for name, values in scene.attributes.items()},
        "caption": scene.template,
        "held_out": sorted(" ".join(c) for c in world.get_held_out(modality)),
    }
    with DatasetWriter(
        folder,
        name=modality,
        modalities=(modality,),
        licence="CC0-1.0",
        source="toyworld",
        attributes=about,
        max_samples=_SHARD_SAMPLES,
    ) as writer:
        bar.note(modality)
        for _ in range(chunks):
            chunk, rendered = next(samples)
            for sample in rendered:
                writer.add(chunk.split, sample.key, sample.parts)
            bar.advance(len(rendered))


def _render(chunk: _Chunk) -> list[ToySample]:
    return [
        render_sample(chunk.modality, chunk.split, index, chunk.seed)
        for index in range(chunk.start, chunk.stop)
    ]


class _Renderer:
    """Renders chunks in this process, or in worker processes."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UsageError(
                f"workers={workers} is below 1.", "somebody must do the work.", "give 1 or more."
            )
        # spawn: forking a process that has torch's threads can hang the child.
        context = multiprocessing.get_context("spawn")
        self._workers = workers
        self._pool = ProcessPoolExecutor(workers, mp_context=context) if workers > 1 else None

    def __enter__(self) -> _Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def in_order(self, chunks: Sequence[_Chunk]) -> Iterator[tuple[_Chunk, list[ToySample]]]:
        """Each chunk with its samples, in the order given.

        Raises:
            OneLLMError: a worker process died.
        """
        if self._pool is None:
            yield from ((chunk, _render(chunk)) for chunk in chunks)
            return
        waiting: deque[tuple[_Chunk, Future[list[ToySample]]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, self._pool.submit(_render, chunk)))
                if len(waiting) >= self._workers * _WINDOW:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise OneLLMError(
                "a worker process of the toy world's builder died (killed, or out of memory).",
                "its samples would be missing.",
                "run again with --workers 1.",
            ) from error


def _names(counts: int | Mapping[str, int]) -> Sequence[str]:
    return tuple(counts) if isinstance(counts, Mapping) else ()


def _count(counts: int | Mapping[str, int], modality: str, default: int) -> int:
    count = counts.get(modality, default) if isinstance(counts, Mapping) else counts
    if count < 1:
        raise UsageError(
            f"{count} samples of {modality}: a split needs at least 1.",
            "an empty split cannot be read.",
            "raise it.",
        )
    return count
