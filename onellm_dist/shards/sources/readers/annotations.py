"""Annotation files of questions and captions about media: what their sources share.

An AnnotationSet says which file has the rows, where the media lie and how a row becomes samples; its source does the rest:
rows are read by byte range (json_stream.py), a row that is not as it should be is one bad sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
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
from onellm_dist.shards.sources.readers.conversations import Turn
from onellm_dist.shards.sources.readers.json_stream import (
    JsonItem,
    read_rows,
    read_rows_at,
    scan_rows,
    split_rows,
)
from onellm_dist.shards.sources.readers.media_files import (
    find_first_file,
    get_extension,
    require_file,
    resolve_below,
)
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing

_ROWS = 1000
_JOINED = "in the sample of its medium's first row"
JOIN_OPTION = Option(
    False,
    "all rows of a medium in one sample: questions as turns of one conversation, captions as a list",
    bool,
)


class MediaNotFetchedError(BadSampleError):
    """The medium is not there."""


@dataclass(frozen=True)
class AnnotatedSample:
    """What a row says."""

    key: str
    parts: Mapping[str, Media]
    conversations: Sequence[Turn]
    caption: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnnotationContext:
    """Where a row's media and the other files lie."""

    inputs: Path
    folders: tuple[Path, ...]
    description: SplitDescription
    options: Mapping[str, Any]

    def partner(self, name: str) -> Path:
        """Another file that the rows need."""
        return resolve_below(self.inputs, self.description["partners"][name])

    def media(self, modality: str, *names: str) -> dict[str, Media]:
        """The part of the first of these files that is there.

        Raises:
            MediaNotFetchedError: none is.
            BadSampleError: it is no medium of this modality, or its name leads out of the folders.
        """
        if any(".." in Path(name).parts for name in names):
            raise BadSampleError(
                f"unreadable row: the file name {names[0]} leads out of the folder"
            )
        file = find_first_file(self.folders, names)
        if file is None:
            raise MediaNotFetchedError(f"missing file: {names[0]}")
        extension = get_extension(modality, file.name)
        if extension is None:
            raise BadSampleError(f"unknown kind of file: {file.name} is not read as {modality}")
        return {extension: file}


@dataclass(frozen=True)
class AnnotationSet:
    """One dataset of annotations."""

    name: str
    summary: str
    modality: str
    files: Mapping[str, Sequence[str]]
    """Split to the usual names of its file of rows; the first split is the one that is built where none is asked for."""
    read: Callable[[AnnotationContext, JsonItem], Sequence[AnnotatedSample]]
    """A row to its samples. KeyError, TypeError, ValueError: it is no such row."""
    key: str | None = None
    """Where the rows stand in the file."""
    folders: Sequence[str] = ()
    """The usual folders of the media, besides IN itself."""
    partners: Mapping[str, tuple[str, Mapping[str, Sequence[str]]]] = field(default_factory=dict)
    """Option to (what the file is, its usual names by split): other files that the rows need."""
    options: Mapping[str, Option] = field(default_factory=dict)
    licence: str = "unknown"
    count: Callable[[Any, str], int] | None = None
    """(row, split) -> its samples in that split, where it has not just one; it sees non-ASCII texts garbled."""

    medium: Callable[[Any], object] | None = None
    """A row to the name of its medium (ASCII), where several rows are about one: they can be joined then."""

    def source(self) -> Source:
        """The builder's source."""
        options = {
            "annotations": Option(
                None,
                f"the file of rows, if it is not {' or '.join(next(iter(self.files.values())))}",
                Path,
            ),
            **{
                n: Option(None, f"{what}, if it does not lie under its usual name", Path)
                for n, (what, _) in self.partners.items()
            },
            "media": Option(
                None,
                f"the folder of the media, if it is not {', '.join((*self.folders, 'IN'))}",
                Path,
            ),
            "splits": Option(
                next(iter(self.files)), f"what is built, by comma, of {', '.join(self.files)}"
            ),
            "missing": MISSING_OPTION,
            **({"join": JOIN_OPTION} if self.medium is not None else {}),
            **self.options,
        }
        return Source(
            self.name,
            self.summary,
            plan=self._plan,
            raw_samples=self._raw_samples,
            options=options,
            licence=self.licence,
        )

    def _plan(
        self,
        inputs: Path,
        *,
        seed: int,
        annotations: Path | None,
        media: Path | None,
        splits: str,
        missing: str,
        **own: Any,
    ) -> DatasetDescription:
        check_missing(missing)
        wanted = [s.strip() for s in splits.split(",")]
        if unknown := [s for s in wanted if s not in self.files]:
            raise UsageError(
                f"splits={splits}: there is no {unknown[0]}.",
                f"{self.name} has others.",
                f"use {', '.join(self.files)}.",
            )
        if annotations is not None and len(wanted) > 1:
            raise UsageError(
                f"one file is named for the splits {splits}.",
                "each has a file of its own.",
                "build one split at a time.",
            )
        find_media_folders(inputs, media, self.folders)
        layout = [self._split(inputs, s, annotations, own) for s in wanted]
        return DatasetDescription((self.modality,), (g for groups in layout for g in groups))

    def _split(
        self, inputs: Path, split: str, annotations: Path | None, own: Mapping[str, Any]
    ) -> Iterator[InputSplit]:
        rows = require_file(
            inputs, annotations, self.files[split], f"{self.name}'s rows of {split}", "annotations"
        )
        partners = {
            n: require_file(inputs, own.get(n), usual[split], what, n)
            for n, (what, usual) in self.partners.items()
        }
        if own.get("join"):
            return self._joined_groups(inputs, rows, split, partners)
        count = self.count
        samples = None if count is None else lambda row: {split: count(row.value, split)}
        return split_rows(
            inputs, rows, _ROWS, key=self.key, count=samples, split=split, partners=partners
        )

    def _raw_samples(
        self,
        inputs: Path,
        description: SplitDescription,
        *,
        media: Path | None,
        missing: str,
        **options: Any,
    ) -> Iterator[RawSample]:
        context = AnnotationContext(
            inputs, find_media_folders(inputs, media, self.folders), description, options
        )
        if "media" in description:
            yield from self._joined(context, missing)
            return
        for item in read_rows(inputs, description):
            planned = 1 if self.count is None else self.count(item.value, description["split"])
            if planned:
                yield from read_raw_samples(lambda i: self.read(context, i), item, planned, missing)

    def _joined_groups(
        self, inputs: Path, rows: str, split: str, partners: Mapping[str, str]
    ) -> Iterator[InputSplit]:
        """Media in the order of their first rows, with the places of their rows (a million rows: some 200 MB while it is planned)."""
        assert self.medium is not None
        found, entries = dict[object, list[tuple[int, int, int]]](), False
        for number, row in enumerate(scan_rows(resolve_below(inputs, rows), self.key)):
            try:
                medium: object = str(self.medium(row.value))
            except (KeyError, TypeError, AttributeError):
                medium = number  # alone: it is said to be bad when it is read
            found.setdefault(medium, []).append((number, row.start, row.end))
            entries = bool(row.key)
        listed = list(found.values())
        for first in range(0, len(listed), _ROWS):
            some = listed[first : first + _ROWS]
            description = {
                "file": rows,
                "split": split,
                "partners": partners,
                "entries": entries,
                "media": some,
            }
            yield InputSplit(f"{rows}:{some[0][0][0]}", description, split, sum(map(len, some)))

    def _joined(self, context: AnnotationContext, missing: str) -> Iterator[RawSample]:
        """A raw_sample for each row: a medium's sample stands for its first good one, the other good ones are left out knowingly."""
        path = resolve_below(context.inputs, context.description["file"])
        for places in context.description["media"]:
            rows = list(read_rows_at(path, places, entries=context.description["entries"]))
            found = [
                c
                for item in rows
                for c in read_raw_samples(lambda i: self.read(context, i), item, 1, missing)
            ]
            good = [c for c in found if c.problem is None and c.skip is None]
            for raw_sample in found:
                if raw_sample.problem is not None or raw_sample.skip is not None:
                    yield raw_sample
                elif raw_sample is good[0]:
                    yield _merged(good)
                else:
                    yield replace(raw_sample, parts={}, skip=_JOINED)


def _merged(raw_samples: Sequence[RawSample]) -> RawSample:
    """One sample of several about one medium; `rows` in its `.json` are their keys."""
    first = raw_samples[0]
    captions = [c.caption for c in raw_samples if c.caption is not None]
    meta: dict[str, Any] = {**first.meta, "rows": [c.key for c in raw_samples]}
    if captions:  # each conversation is the same question about the medium
        return replace(first, caption=None, meta={**meta, "caption": captions})
    differing = [k for k in first.meta if any(c.meta.get(k) != first.meta[k] for c in raw_samples)]
    meta.update({k: [c.meta.get(k) for c in raw_samples] for k in differing})
    meta["conversations"] = [turn for c in raw_samples for turn in c.meta["conversations"]]
    return replace(first, meta=meta)


def find_media_folders(inputs: Path, media: Path | None, usual: Sequence[str]) -> tuple[Path, ...]:
    """Where media are looked for: the user's folder, or those of the usual ones that are there, and IN itself.

    Raises:
        UsageError: the user's folder is not there.
    """
    if media is None:
        return (*(f for name in usual if (f := inputs / name).is_dir()), inputs)
    folder = resolve_below(inputs, media)
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: there is no such folder.", "media are looked for there.", "check -o media=."
        )
    return (folder,)


def read_raw_samples(
    read: Callable[[JsonItem], Sequence[AnnotatedSample]],
    item: JsonItem,
    planned: int,
    missing: str,
) -> Iterator[RawSample]:
    """The raw_samples of a row: its samples, or, where it cannot be used, as many bad ones as were planned for it.

    Args:
        missing: "fail": a medium that is not there makes a bad sample; "skip": one that is left out knowingly.
    """
    problem: str | None = None
    skip: str | None = None
    try:
        if not isinstance(item.value, Mapping):
            raise ValueError(
                "not JSON"
                if item.value is None
                else f"a {type(item.value).__name__}, not an object"
            )
        samples = read(item)
        if len(samples) != planned:
            raise ValueError(f"{len(samples)} samples where {planned} were planned")
        for sample in samples:
            meta = {**sample.meta, "conversations": list(sample.conversations)}
            yield RawSample(sample.key, item.where, sample.parts, sample.caption, meta)
        return
    except MediaNotFetchedError as error:
        problem, skip = (error.what, None) if missing == "fail" else (None, "media was not fetched")
    except BadSampleError as error:
        problem = error.what
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        problem = f"unreadable row: {f'no {error}' if isinstance(error, KeyError) else error}"
    name = make_safe_key(item.where.replace("[", "-").rstrip("]"))
    for number in range(planned):
        yield RawSample(
            f"{name}-{number}" if number else name, item.where, problem=problem, skip=skip
        )


def require_text(value: Any, what: str) -> str:
    """A text that is not empty.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {value!r}, not a text")
    return value.strip()
