"""The questions of a benchmark's dataset, and what they are about."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.logging import ONCE, get_logger
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.data.text_parts import read_meta
from onellm_dist.evaluation.questions import BenchmarkQuestion
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.modalities import Modality, Part, get_modality
from onellm_dist.modalities.drawing import join_pictures, make_thumbnail
from onellm_dist.modalities.library_faults import translate_errors
from onellm_dist.shards.build.registry import all_sources
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.sources.readers.benchmarks import SUFFIX
from onellm_dist.shards.tools.safe_decoding import map_rows

_log = get_logger(__name__)
EXAMPLE_SIDE = 224
"""Pixels of the longer side of a drawn example."""


@dataclass(frozen=True)
class AskedMedium:
    """One sample: a medium (or a picture and its map, a video and its sound) and its questions."""

    shard: ShardInfo
    row: int
    key: str
    questions: Sequence[BenchmarkQuestion]


@dataclass(frozen=True)
class ReadMedium:
    """A sample that was decoded."""

    key: str
    values: Mapping[str, Sequence[torch.Tensor]]
    """Modality -> [*value_shape] model input of each of its spans."""
    content: Mapping[str, str]
    """Modality -> what identifies its content."""
    picture: bytes | None = None
    """A PNG of the medium for people, if it was asked for."""


class SplitCounts(NamedTuple):
    """How many questions a split has."""

    whole: int
    """The official number, or what a larger set has."""
    there: int
    """What the dataset was built from; media that could not be read are counted too."""
    readable: int | None
    """Questions whose media the dataset has; None: not counted."""


def list_media(
    dataset: Dataset, task: Task, split: str, limit: int | None, *, any_count: bool = False
) -> list[AskedMedium]:
    """List the samples of a split with their questions.

    Args:
        dataset: the benchmark's dataset.
        task: the task.
        split: its split.
        limit: only the first N questions.
        any_count: whether questions may be missing, because their media could not be read.

    Raises:
        UsageError: it is another benchmark's dataset, questions are missing, or an id is repeated.
        SampleError: a sample has no questions.
    """
    attributes = dataset.manifest.attributes
    if attributes.get("benchmark") != task.name:
        raise UsageError(
            f"{dataset.location} is not a dataset of the benchmark {task.name}",
            f"it was built from {attributes.get('benchmark') or 'another source'}.",
            f"build it: onellm shards build {task.name}-eval IN OUT.",
        )
    found: list[AskedMedium] = []
    left = limit if limit is not None else None
    seen: set[str] = set()
    for shard in dataset.shards(split):
        for row in range(shard.samples):
            if left == 0:
                return found
            medium = _read_questions(dataset, shard, row)
            if left is not None:
                kept = medium.questions[:left]
                medium = AskedMedium(shard, row, medium.key, kept)
                left -= len(kept)
            _check_new(dataset, seen, medium)
            found.append(medium)
    expected = attributes.get("questions", {}).get(split)
    if left is None and not any_count and expected is not None and len(seen) != expected:
        raise UsageError(
            f"{dataset.location}: {task.name} {split} has {len(seen):,} of "
            f"{format_count(expected, 'question')}",
            "the media of the others could not be read when it was built; quarantine.jsonl there "
            "names them.",
            "repair them and build again, or score what is there: --any-count.",
        )
    return found


def count_split(dataset: Dataset, split: str, listed: int, limit: int | None = None) -> SplitCounts:
    """Count the questions of a split: officially, and in the dataset.

    A dataset that was built with `any_count=true` may have fewer than the official number. Of one
    that an older version built, the source knows that number; where it does not, a warning says so.

    Args:
        dataset: the benchmark's dataset.
        split: its split.
        listed: how many were found.
        limit: how many were looked for. Where that cut any, the others are not counted: all
            samples would have to be read.
    """
    attributes = dataset.manifest.attributes
    there = int(attributes.get("questions", {}).get(split, listed))
    official = attributes.get("official_questions")
    whole = _ask_source(dataset, split, there) if official is None else official.get(split)
    cut = limit is not None and limit <= listed < there
    return SplitCounts(max(there, int(whole or 0)), there, None if cut else listed)


def _ask_source(dataset: Dataset, split: str, there: int) -> int | None:
    """The official number of questions of a split, of which a dataset has some."""
    name = f"{dataset.manifest.attributes.get('benchmark')}{SUFFIX}"
    source = all_sources().get(name)
    count = None if source is None else source.official_count
    found = None if count is None else count(split, there)
    if found is None:
        _log.warning(
            "%s does not say how many questions %s has officially: whether these are all of them "
            "is not known. Build it again to know.",
            *(dataset.location, split),
            extra=ONCE,
        )
    return found


def _read_questions(dataset: Dataset, shard: ShardInfo, row: int) -> AskedMedium:
    key = dataset.index(shard).key(row)
    listed = read_meta(read_parts(dataset, shard, row, ("json",))).get("questions")
    try:
        questions = [BenchmarkQuestion.from_json(value) for value in listed or ()]
    except (TypeError, ValueError):
        questions = []
    if not questions:
        raise SampleError(
            f"{dataset.name}/{shard.name}/{key} has no questions",
            "there is nothing to ask.",
            "build the dataset again.",
        )
    return AskedMedium(shard, row, key, questions)


def _check_new(dataset: Dataset, seen: set[str], medium: AskedMedium) -> None:
    for question in medium.questions:
        if question.id in seen:
            raise UsageError(
                f"{dataset.location}: the question {question.id} occurs twice",
                "it would count twice.",
                "build the dataset again.",
            )
        seen.add(question.id)


def read_media(
    dataset: Dataset,
    media: Sequence[AskedMedium],
    drawn: frozenset[str],
    spans: Mapping[str, int],
) -> Generator[ReadMedium]:
    """Decode samples in order, in a worker process, while others are being answered.

    Args:
        dataset: the dataset.
        media: some of its samples.
        drawn: keys of those that are drawn for people, too.
        spans: modality -> the most spans of a medium, as the model was trained; default: one.

    Raises:
        SampleError: one cannot be read; the message names it.
    """

    def read(dataset: Dataset, shard: ShardInfo, row: int) -> ReadMedium:
        return _read_medium(dataset, shard, row, drawn, spans)

    rows = [(medium.shard, medium.row) for medium in media]
    with closing(map_rows(dataset, rows, read, _refuse)) as found:
        yield from found


def _read_medium(
    dataset: Dataset,
    shard: ShardInfo,
    row: int,
    drawn: frozenset[str],
    spans: Mapping[str, int],
) -> ReadMedium:
    key, parts = dataset.index(shard).key(row), read_parts(dataset, shard, row)
    meta = read_meta(parts)
    values, content, pictures = {}, {}, []
    for modality in map(get_modality, dataset.modalities):
        matched = {role: parts[extension] for role, extension in modality.match(parts).items()}
        try:
            with decoding():
                most = spans.get(modality.name, 1)
                values[modality.name] = read_spans(modality, matched, meta, most)
                if key in drawn:
                    picture = modality.preview(modality.read_raw(matched, meta))
                    pictures.append(make_thumbnail(picture, EXAMPLE_SIDE))
        except SampleError as error:
            raise SampleError(
                f"{dataset.name}/{shard.name}/{key}: {error.what}", error.why, error.do
            ) from error
        digest = hashlib.sha256()
        for role in sorted(matched):
            digest.update(matched[role].data)
        content[modality.name] = digest.hexdigest()
    return ReadMedium(key, values, content, _encode_png(pictures) if pictures else None)


def read_spans(
    modality: Modality, media: Mapping[str, Part], meta: Mapping[str, Any], most: int
) -> list[torch.Tensor]:
    """Read a medium as the model's input for each of its spans, with the evaluation transform.

    Args:
        modality: its modality.
        media: role to part.
        meta: the sample's `.json`.
        most: the most spans that it may take.

    Raises:
        SampleError: it cannot be read.
    """
    with translate_errors(modality.name):
        count = modality.count_spans(modality.measure(media), most) if most > 1 else 1
        rng = np.random.default_rng(0)
        return modality.read_spans(media, meta, spans=count, train=False, rng=rng)


def _encode_png(pictures: list[Image.Image]) -> bytes:
    out = io.BytesIO()
    join_pictures(pictures).save(out, "PNG")
    return out.getvalue()


def _refuse(dataset: Dataset, shard: ShardInfo, row: int, reason: str) -> ReadMedium:
    key = dataset.index(shard).key(row)
    raise SampleError(f"{dataset.name}/{shard.name}/{key}: its decoder failed: {reason}")
