"""Make the plan of a build from what the source finds in its input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.progress import progress
from onellm_dist.shards.build.confine import find_allowed_roots
from onellm_dist.shards.build.descriptions import check_description
from onellm_dist.shards.build.images import get_picture_extensions
from onellm_dist.shards.build.plan import BuildPlan, PlannedSplit, to_json_options
from onellm_dist.shards.build.questions import list_questions
from onellm_dist.shards.build.registry import get_source
from onellm_dist.shards.build.settings import BuildSettings
from onellm_dist.shards.format.media import LISTED
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    Source,
    SplitDescription,
)
from onellm_dist.shards.storage.paths import StoragePath


def make_plan(
    source: Source,
    inputs: StoragePath,
    *,
    seed: int,
    options: Mapping[str, Any],
    settings: BuildSettings,
    workers: int,
) -> tuple[BuildPlan, bytes]:
    """Make a plan.

    Args:
        source: a source with `plan` and `raw_samples`.
        inputs: its input.
        seed: of sources that draw or shuffle.
        options: the source's own, complete.
        settings: the builder's.
        workers: processes that count raw samples where the source does not know the number.

    Returns:
        The plan, and the bytes of input_splits.jsonl.

    Raises:
        UsageError: the input is not what the source reads, or is empty; `dedup` compares what its
            samples do not have, or `follow`, `question` or `describe` cannot be used.
    """
    assert source.plan is not None
    find_allowed_roots(source, inputs, options, settings.follow)
    found: DatasetDescription = source.plan(inputs, seed=seed, **options)
    _check_dedup(settings, found)
    list_questions(settings.question, found.modalities)
    check_description(settings.describe, found.modalities, source)
    listed = list(_take_enough(found.input_splits, settings.limit))
    counted = _count_unknown(source, inputs, listed, options, workers)
    splits = [s for s in _cut_at_limit(counted, settings.limit) if s.count]
    if not splits:
        raise UsageError(
            f"{inputs}: source {source.name!r} found no samples there.",
            "there is nothing to build from.",
            "check the path.",
        )
    rows, lines, offset = list[PlannedSplit](), list[bytes](), 0
    for split in splits:
        line = json.dumps(split.description, sort_keys=True).encode("ascii") + b"\n"
        rows.append(PlannedSplit(split.name, split.split, split.count or 0, offset, len(line)))
        lines.append(line)
        offset += len(line)
    plan = BuildPlan(
        source.name,
        str(inputs),
        seed,
        to_json_options(options),
        settings,
        found.modalities,
        found.notes,
        dict(found.attributes),
        tuple(rows),
        settings.denylist_sha256(),
    )
    return plan, b"".join(lines)


def _check_dedup(settings: BuildSettings, found: DatasetDescription) -> None:
    if settings.dedup == "perceptual" and LISTED.items() <= dict(found.attributes).items():
        raise UsageError(
            "dedup=perceptual, and samples of this dataset have any number of media.",
            "near copies are found by the one picture that a sample is; those without a picture "
            "would all look alike, and of several pictures one would decide.",
            "use dedup=exact.",
        )
    if settings.dedup == "perceptual" and not get_picture_extensions(found.modalities):
        raise UsageError(
            f"dedup=perceptual, and samples of {', '.join(found.modalities) or 'text'} have no "
            "picture of their own.",
            "near copies are found by the one picture that a sample is; without it all samples "
            "would look alike.",
            "use dedup=exact.",
        )


def _take_enough(splits: Iterable[InputSplit], limit: int | None) -> Iterator[InputSplit]:
    """Yield input splits until they certainly hold `limit` raw samples."""
    known = 0
    for split in splits:
        yield split
        known += split.count or 0
        if limit is not None and known >= limit:
            return


def _cut_at_limit(splits: Sequence[InputSplit], limit: int | None) -> Iterator[InputSplit]:
    """Yield the input splits with their counts cut so that they sum to at most `limit`."""
    left = limit
    for split in splits:
        if left is None:
            yield split
        else:
            count = min(left, split.count or 0)
            yield replace(split, count=count)
            left -= count


def _count_unknown(
    source: Source,
    inputs: StoragePath,
    splits: list[InputSplit],
    options: Mapping[str, Any],
    workers: int,
) -> list[InputSplit]:
    """Return the input splits, all with counts; those without one are read through."""
    unknown = [i for i, split in enumerate(splits) if split.count is None]
    if not unknown:
        return splits
    jobs = [(source.name, inputs, splits[i].description, dict(options)) for i in unknown]
    with progress(len(jobs), "Counting samples", unit="input splits") as bar:
        if workers == 1 or len(jobs) < 2 * workers:
            for i, job in zip(unknown, jobs, strict=True):
                splits[i] = replace(splits[i], count=count_raw_samples(*job))
                bar.advance()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                counts = pool.map(count_raw_samples, *zip(*jobs, strict=True), chunksize=4)
                for i, count in zip(unknown, counts, strict=True):
                    splits[i] = replace(splits[i], count=count)
                    bar.advance()
    return splits


def count_raw_samples(
    source: str,
    inputs: StoragePath,
    description: SplitDescription,
    options: Mapping[str, Any],
) -> int:
    """Count the raw samples of one input split by reading through it."""
    raw_samples = get_source(source).raw_samples
    assert raw_samples is not None
    return sum(1 for _ in raw_samples(inputs, description, **options))
