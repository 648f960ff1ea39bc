"""What the sources of benchmarks share: all questions about a medium are one sample.

A BenchmarkSet says how the official files of a split become rows. Its source groups the rows by
their medium, so that a medium is stored, decoded and encoded once, however many questions there are
about it. A sample's `.json` has them as `questions` (`BenchmarkRow.record`); the manifest's
attributes have the benchmark's name and how many questions each split has.

The files of a split are read as a whole (VQAv2 test, the largest, has 447,793 questions). The
number of questions must be an official one, and ids must be unique; otherwise nothing is built.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.names import make_safe_key
from onellm_dist.shards.sources.base import (
    BadSampleError,
    DatasetDescription,
    InputSplit,
    Media,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.annotations import find_media_folders
from onellm_dist.shards.sources.readers.media_files import (
    find_first_file,
    get_extension,
    get_write_stamp,
)
from onellm_dist.shards.sources.readers.named_files import describe_missing_file
from onellm_dist.shards.sources.readers.sound_tracks import SoundTrack
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique

_MEDIA_A_SPLIT = 500
SUFFIX = "-eval"
"""The source of the benchmark `gqa` is `gqa-eval`."""
COUNT_OPTION = Option(
    False, "build a split that has another number of questions than the official one", bool
)

MediaNames = Mapping[str, Sequence[str] | Media]
"""Modality, or part extension -> the names that the file may have, or its content."""


@dataclass(frozen=True)
class BenchmarkRow:
    """One question."""

    record: Mapping[str, Any]
    """`id`, `text`, `options`, `answers`, `labels`, `extra`: see evaluation/questions.py."""
    medium: str
    """Name of its medium; rows with the same name have the same media."""
    media: MediaNames
    meta: Mapping[str, Any] = field(default_factory=dict)
    """How the medium is to be read (a window), for the sample's `.json`."""


@dataclass(frozen=True)
class BenchmarkFiles:
    """Where the files of a benchmark lie."""

    inputs: Path
    split: str

    def find(self, *names: str) -> Path:
        """Find the first of these files, `{split}` filled in.

        Raises:
            UsageError: there is none.
        """
        listed = [name.format(split=self.split) for name in names]
        found = find_first_file([self.inputs], listed)
        if found is None:
            raise UsageError(
                f"{self.inputs}: there is no {' or '.join(listed)}.",
                f"the questions of the split {self.split} are read from it.",
                "put it there under its official name.",
            )
        return found

    def load_json(self, *names: str) -> Any:
        """Load the first of these JSON files.

        Raises:
            UsageError: there is none.
            OneLLMError: it is not JSON.
        """
        path = self.find(*names)
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise _make_file_error(path, error) from error

    def read_table(
        self, *names: str, separator: str = ",", head: Sequence[str] | None = None
    ) -> list[dict[str, str]]:
        """Read a table as rows by column.

        Args:
            names: what the file may be called.
            separator: between columns.
            head: names of the columns of a file without a line of them.

        Raises:
            UsageError: there is no such file.
            OneLLMError: a row has another number of columns.
        """
        path = self.find(*names)
        csv.field_size_limit(1 << 28)  # pictures in base64
        text = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
        rows = list(csv.DictReader(text, head, delimiter=separator))
        for number, row in enumerate(rows):
            if None in row or None in row.values():
                raise _make_file_error(path, f"row {number + 1} has another number of columns")
        return rows


def _make_file_error(path: Path, why: object) -> OneLLMError:
    return OneLLMError(
        f"{path}: {why}",
        "questions would be missing.",
        "download the file again; it may be cut short.",
    )


@dataclass(frozen=True)
class BenchmarkSet:
    """A benchmark."""

    name: str
    summary: str
    modalities: tuple[str, ...]
    splits: Mapping[str, tuple[int, ...]]
    """Split -> the official numbers of questions; () where none is stated. The first is built by
    default."""
    read: Callable[[BenchmarkFiles], Iterable[BenchmarkRow]]
    """The rows of a split, in the official order; KeyError, TypeError or ValueError: the files are
    others than the official ones."""
    folders: Sequence[str] = ()
    """The usual folders of the media, besides IN itself."""
    licence: str = "unknown"
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Keys of every sample's `.json`, such as `depth_is_distance`."""

    def make_source(self) -> Source:
        """Make the source that the builder uses."""
        return Source(
            f"{self.name}{SUFFIX}",
            f"{self.summary} (benchmark: onellm evaluate)",
            plan=self._plan,
            raw_samples=self._raw_samples,
            options={
                "media": Option(
                    None,
                    f"the folder of the media, if it is not {', '.join((*self.folders, 'IN'))}",
                    Path,
                ),
                "splits": Option(
                    next(iter(self.splits)),
                    f"what is built, separated by commas: {', '.join(self.splits)}",
                ),
                "any_count": COUNT_OPTION,
            },
            licence=self.licence,
            official_count=self.get_official_count,
        )

    def _plan(
        self, inputs: Path, *, seed: int, media: Path | None, splits: str, any_count: bool
    ) -> DatasetDescription:
        wanted = [s.strip() for s in splits.split(",")]
        if unknown := [s for s in wanted if s not in self.splits]:
            raise UsageError(
                f"splits={splits}: there is no split {unknown[0]}.",
                f"{self.name} does not have it.",
                f"use {', '.join(self.splits)}.",
            )
        find_media_folders(inputs, media, self.folders)
        parts: list[InputSplit] = []
        counts = {}
        for split in wanted:
            groups = load_groups(self, inputs, split)
            counts[split] = sum(len(rows) for _, rows in groups)
            if not any_count:
                self._check_count(inputs, split, counts[split])
            for first in range(0, len(groups), _MEDIA_A_SPLIT):
                last = min(first + _MEDIA_A_SPLIT, len(groups))
                ids = [rows[0].record["id"] for _, rows in (groups[first], groups[last - 1])]
                description = {"split": split, "first": first, "last": last, "ids": ids}
                parts.append(InputSplit(f"{split}:{first}", description, split, last - first))
        attributes = {
            "benchmark": self.name,
            "questions": counts,
            "official_questions": {
                split: self.get_official_count(split, count)
                for split, count in counts.items()
                if self.splits[split]
            },
        }
        return DatasetDescription(self.modalities, parts, attributes=attributes)

    def get_official_count(self, split: str, count: int) -> int | None:
        """The official number of questions that `count` is, or is a part of; else the largest.

        It is `count` itself where no number is stated, and None for a split that does not exist.
        """
        if split not in self.splits:
            return None
        official = self.splits[split] or (count,)
        return min((n for n in official if n >= count), default=max(official))

    def _check_count(self, inputs: Path, split: str, count: int) -> None:
        official = self.splits[split]
        if official and count not in official:
            raise UsageError(
                f"{inputs}: {self.name} {split} has {count:,} questions, officially "
                f"{' or '.join(f'{n:,}' for n in official)}.",
                "scores of another set cannot be compared.",
                "get the official files, or build what is there: -o any_count=true.",
            )

    def _raw_samples(
        self,
        inputs: Path,
        description: SplitDescription,
        *,
        media: Path | None,
        splits: str,
        any_count: bool,
    ) -> Iterator[RawSample]:
        folders = find_media_folders(inputs, media, self.folders)
        groups = load_groups(self, inputs, description["split"])
        chosen = groups[description["first"] : description["last"]]
        if [rows[0].record["id"] for _, rows in (*chosen[:1], *chosen[-1:])] != description["ids"]:
            raise _make_file_error(inputs, f"{self.name}'s files changed while it was being built")
        for key, rows in chosen:
            first = rows[0]
            where = f"{description['split']} question {first.record['id']}"
            meta = {**self.meta, **first.meta, "questions": [dict(row.record) for row in rows]}
            try:
                yield RawSample(key, where, find_parts(folders, first.media), meta=meta)
            except BadSampleError as error:
                yield RawSample(key, where, problem=error.what)


def find_parts(folders: Sequence[Path], media: MediaNames) -> dict[str, Media]:
    """Find the files of a medium: part extension -> file.

    The sound of a video is its own file, or is taken out of the video.

    Raises:
        BadSampleError: a file is missing, or of another kind.
    """
    parts: dict[str, Media] = {}
    for kind, names in media.items():
        if not isinstance(names, Sequence):
            parts[kind] = names
            continue
        if any(".." in Path(name).parts for name in names):
            raise BadSampleError(f"unreadable row: the file name {names[0]} leads out")
        file = find_first_file(folders, names)
        if file is None:
            raise BadSampleError(describe_missing_file(list(folders), names[0]))
        extension, content = _choose_part(kind, file)
        parts[extension] = content
    return parts


def _choose_part(kind: str, file: Path) -> tuple[str, Media]:
    """The part that a file becomes: `kind` is a modality, or already an extension."""
    if "." in kind:
        return kind, file
    extension = get_extension(kind, file.name)
    if extension is not None:
        return extension, file
    if kind == "audio" and get_extension("video", file.name) is not None:
        return "mka", SoundTrack(file)
    accepted = next(iter(get_modality(kind).required_parts.values()))
    raise BadSampleError(
        f"unknown kind of file: {file.name} is not read as {kind} ({', '.join(accepted)})"
    )


def load_groups(
    benchmark: BenchmarkSet, inputs: Path, split: str
) -> list[tuple[str, list[BenchmarkRow]]]:
    """The rows of a split by medium: (key of the sample, its rows), in the order of first rows.

    Raises:
        UsageError: a file is missing, or an id is repeated.
        OneLLMError: the files are others than the official ones.
    """
    stamp = get_write_stamp(inputs)
    return _load_groups(benchmark.name, inputs, split, stamp, _Reader(benchmark))


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads a benchmark; all readers are equal, so that they do not matter to a cache."""

    benchmark: BenchmarkSet

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reader)

    def __hash__(self) -> int:
        return 0


_OTHER_FILES = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError),
    # A file beside the list is missing, or a folder in its place; ast.literal_eval.
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, SyntaxError),
)


@lru_cache(maxsize=2)
def _load_groups(
    name: str, inputs: Path, split: str, stamp: int, reader: _Reader
) -> list[tuple[str, list[BenchmarkRow]]]:
    try:
        rows = list(reader.benchmark.read(BenchmarkFiles(inputs, split)))
    except _OTHER_FILES as error:
        raise OneLLMError(
            f"{inputs}: {name} {split} cannot be read: "
            f"{f'no {error}' if isinstance(error, KeyError) else error}",
            "the files differ from the official ones.",
            "download them again, under their official names.",
        ) from error
    except OSError as error:
        raise OneLLMError(
            f"{error.filename or inputs}: {error.strerror or error}",
            f"the files of {name} {split} cannot be read.",
            "check their permissions and the disk.",
        ) from error
    _check_ids(inputs, name, split, rows)
    groups: dict[str, list[BenchmarkRow]] = {}
    for row in rows:
        groups.setdefault(row.medium, []).append(row)
    keys = make_keys_unique(make_safe_key(medium) for medium in groups)
    return list(zip(keys, groups.values(), strict=True))


def _check_ids(inputs: Path, name: str, split: str, rows: Sequence[BenchmarkRow]) -> None:
    seen: set[str] = set()
    repeated = []
    for row in rows:
        if row.record["id"] in seen:
            repeated.append(row.record["id"])
        seen.add(row.record["id"])
    if repeated:
        raise UsageError(
            f"{inputs}: {name} {split} has the id {repeated[0]} several times"
            f"{f' ({len(repeated)} such ids)' if len(repeated) > 1 else ''}.",
            "an answer could not be distinguished from another one.",
            "get the official files.",
        )
