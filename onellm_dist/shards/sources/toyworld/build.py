"""Writing the toy world's datasets: one folder per modality, with three splits each.

The splits are train, test_seen and test_held_out. Workers only render. One process writes, in
order, so the bytes on disk do not depend on the number of workers.
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

TRAIN = 2000
"""Default number of samples of train."""
TEST = 120
"""Default number of samples of each test split."""
_SHARD_SAMPLES = 500
_CHUNK = 16
"""Samples that a worker renders at a time."""
_WINDOW = 4
"""Submitted chunks per worker; this bounds the memory of samples that wait to be written."""


class _SampleRange(NamedTuple):
    """Consecutive samples of one split."""

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
        out: the parent folder; none of the datasets may exist in it.
        seed: determines renderings and their order, but not which combinations are held out.
        train_per_modality: samples of `train`: one number, or one for each modality (the default
            for those not named).
        test_per_modality: samples of `test_seen` and of `test_held_out`, in the same form.
        modalities: which datasets to build.
        workers: number of processes that render.

    Raises:
        UsageError: a modality is unknown, a number is below 1, or an output exists.
    """
    for modality in (*modalities, *_get_names(train_per_modality), *_get_names(test_per_modality)):
        world.get_scenes(modality)
    chunks: list[_SampleRange] = []
    for modality in modalities:
        train = _get_count(train_per_modality, modality, TRAIN)
        test = _get_count(test_per_modality, modality, TEST)
        for split, count in zip(draws.DATASET_SPLITS, (train, test, test), strict=True):
            chunks += [
                _SampleRange(modality, split, i, min(i + _CHUNK, count), seed)
                for i in range(0, count, _CHUNK)
            ]
    total = sum(c.stop - c.start for c in chunks)
    with ExitStack() as stack:
        samples = stack.enter_context(_Renderer(workers)).render_in_order(chunks)
        bar: Progress[int] = stack.enter_context(
            progress(total, "Building the toy world", unit="samples")
        )
        for modality in modalities:
            count = sum(c.modality == modality for c in chunks)
            _write_dataset(out / modality, modality, seed, samples, count, bar)
    lines = world.describe().splitlines()
    return BuildReport(total, notes=tuple(n for n in lines if n.split(":")[0] in modalities))


def _write_dataset(
    folder: Path,
    modality: str,
    seed: int,
    samples: Iterator[tuple[_SampleRange, list[ToySample]]],
    chunks: int,
    bar: Progress[int],
) -> None:
    """Write one modality's dataset from the next `chunks` results of `samples`."""
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


def _render_range(chunk: _SampleRange) -> list[ToySample]:
    return [
        render_sample(chunk.modality, chunk.split, index, chunk.seed)
        for index in range(chunk.start, chunk.stop)
    ]


class _Renderer:
    """Renders chunks in this process, or in worker processes."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UsageError(
                f"workers={workers} is below 1.", "somebody must do the work.", "use 1 or more."
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

    def render_in_order(
        self, chunks: Sequence[_SampleRange]
    ) -> Iterator[tuple[_SampleRange, list[ToySample]]]:
        """Render chunks in the order given.

        Raises:
            OneLLMError: a worker process died.
        """
        if self._pool is None:
            yield from ((chunk, _render_range(chunk)) for chunk in chunks)
            return
        waiting: deque[tuple[_SampleRange, Future[list[ToySample]]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, self._pool.submit(_render_range, chunk)))
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


def _get_names(counts: int | Mapping[str, int]) -> Sequence[str]:
    return tuple(counts) if isinstance(counts, Mapping) else ()


def _get_count(counts: int | Mapping[str, int], modality: str, default: int) -> int:
    count = counts.get(modality, default) if isinstance(counts, Mapping) else counts
    if count < 1:
        raise UsageError(
            f"{count} samples of {modality}: a split needs at least 1.",
            "an empty split cannot be read.",
            "raise it.",
        )
    return count
