"""What the sources of questions and captions about media share.

An AnnotationSet says which file has the rows, where the media lie, and how a row becomes samples.
Its source does the rest: rows are read by byte range (json_stream.py), and a row that cannot be
used is one bad sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
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
"""Why a row is skipped whose medium has a sample already."""
JOIN_OPTION = Option(
    False,
    "all rows of a medium in one sample: questions as turns of a conversation, captions as a list",
    bool,
)


class MediaNotFetchedError(BadSampleError):
    """The medium is missing."""


@dataclass(frozen=True)
class AnnotatedSample:
    """What a row says about one sample."""

    key: str
    parts: Mapping[str, Media]
    """Extension to media."""
    conversations: Sequence[Turn]
    caption: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnnotationContext:
    """Where the media of rows and other files lie."""

    inputs: Path
    folders: tuple[Path, ...]
    description: SplitDescription
    options: Mapping[str, Any]

    def resolve_partner(self, name: str) -> Path:
        """Resolve the path of another file that the rows need."""
        return resolve_below(self.inputs, self.description["partners"][name])

    def find_media(self, modality: str, *names: str) -> dict[str, Media]:
        """Find the first of these files that exists.

        Returns:
            Its extension to the file.

        Raises:
            MediaNotFetchedError: none of them exists.
            BadSampleError: the file is not media of this modality, or a name leads out of the
                folders.
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
    """A dataset of annotations."""

    name: str
    summary: str
    modality: str
    files: Mapping[str, Sequence[str]]
    """Split to the usual names of its file of rows; the first split is built by default."""
    read: Callable[[AnnotationContext, JsonItem], Sequence[AnnotatedSample]]
    """Makes samples of a row; KeyError, TypeError or ValueError means: a malformed row."""
    key: str | None = None
    """The key under which the rows stand in the file; None: the file itself is the list."""
    folders: Sequence[str] = ()
    """The usual folders of the media, besides IN itself."""
    partners: Mapping[str, tuple[str, Mapping[str, Sequence[str]]]] = field(default_factory=dict)
    """Other files that the rows need: option to (what the file is, its usual names by split)."""
    options: Mapping[str, Option] = field(default_factory=dict)
    licence: str = "unknown"
    count: Callable[[Any, str], int] | None = None
    """(row, split) -> number of its samples in that split; None: always one.

    Text that is not ASCII is garbled here (see `JsonRow`)."""

    medium: Callable[[Any], object] | None = None
    """Row to the name of its medium (ASCII), if rows about the same medium can be joined."""

    def make_source(self) -> Source:
        """Make the source that the builder uses."""
        options = {
            "annotations": Option(
                None,
                f"the file of rows, if it is not {' or '.join(next(iter(self.files.values())))}",
                Path,
            ),
            **{
                n: Option(None, f"{what}, if it does not have its usual name", Path)
                for n, (what, _) in self.partners.items()
            },
            "media": Option(
                None,
                f"the folder of the media, if it is not {', '.join((*self.folders, 'IN'))}",
                Path,
            ),
            "splits": Option(
                next(iter(self.files)),
                f"what is built, separated by commas: {', '.join(self.files)}",
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
            reads_as_stored=True,
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
                f"splits={splits}: there is no split {unknown[0]}.",
                f"{self.name} does not have it.",
                f"use {', '.join(self.files)}.",
            )
        if annotations is not None and len(wanted) > 1:
            raise UsageError(
                f"one file is named for the splits {splits}.",
                "each split has a file of its own.",
                "build one split at a time.",
            )
        find_media_folders(inputs, media, self.folders)
        parts = [self._make_splits(inputs, s, annotations, own) for s in wanted]
        return DatasetDescription((self.modality,), chain.from_iterable(parts))

    def _make_splits(
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
            return self._make_joined_splits(inputs, rows, split, partners)
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
            yield from self._read_joined(context, missing)
            return
        for item in read_rows(inputs, description):
            planned = 1 if self.count is None else self.count(item.value, description["split"])
            if planned:
                yield from read_raw_samples(lambda i: self.read(context, i), item, planned, missing)

    def _make_joined_splits(
        self, inputs: Path, rows: str, split: str, partners: Mapping[str, str]
    ) -> Iterator[InputSplit]:
        """Media in the order of their first rows, with the places of their rows.

        Planning takes about 200 MB for a million rows.
        """
        assert self.medium is not None
        found, entries = dict[object, list[tuple[int, int, int]]](), False
        for number, row in enumerate(scan_rows(resolve_below(inputs, rows), self.key)):
            try:
                medium: object = str(self.medium(row.value))
            except (KeyError, TypeError, AttributeError):
                medium = number  # alone: it is reported as bad when it is read
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

    def _read_joined(self, context: AnnotationContext, missing: str) -> Iterator[RawSample]:
        """Yield a raw sample for each row.

        The sample of a medium stands for its first good row; its other good rows are skipped.
        """
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
                    yield _merge_rows(good)
                else:
                    yield replace(raw_sample, parts={}, skip=_JOINED)


def _merge_rows(raw_samples: Sequence[RawSample]) -> RawSample:
    """Merge the samples of one medium; `rows` in the `.json` lists their keys."""
    first = raw_samples[0]
    captions = [c.caption for c in raw_samples if c.caption is not None]
    meta: dict[str, Any] = {**first.meta, "rows": [c.key for c in raw_samples]}
    if captions:  # each conversation asks the same about the medium
        return replace(first, caption=None, meta={**meta, "caption": captions})
    differing = [k for k in first.meta if any(c.meta.get(k) != first.meta[k] for c in raw_samples)]
    meta.update({k: [c.meta.get(k) for c in raw_samples] for k in differing})
    meta["conversations"] = [turn for c in raw_samples for turn in c.meta["conversations"]]
    return replace(first, meta=meta)


def find_media_folders(inputs: Path, media: Path | None, usual: Sequence[str]) -> tuple[Path, ...]:
    """Find the folders where media are searched.

    Args:
        inputs: the input folder.
        media: the user's choice.
        usual: the usual folders, relative to `inputs`.

    Returns:
        The user's folder, or those of the usual ones that exist, and `inputs` itself.

    Raises:
        UsageError: the user's folder does not exist.
    """
    if media is None:
        return (*(f for name in usual if (f := inputs / name).is_dir()), inputs)
    folder = resolve_below(inputs, media)
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: there is no such folder.", "media are searched there.", "check -o media=."
        )
    return (folder,)


def read_raw_samples(
    read: Callable[[JsonItem], Sequence[AnnotatedSample]],
    item: JsonItem,
    planned: int,
    missing: str,
) -> Iterator[RawSample]:
    """Read the raw samples of a row; a row that cannot be used makes as many bad ones as planned.

    Args:
        read: makes samples of a row.
        item: the row.
        planned: how many samples the plan counted.
        missing: what a missing medium makes: "fail": a bad sample; "skip": a skipped one.
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
            raise ValueError(
                f"{format_count(len(samples), 'sample')} where {planned} "
                f"{'was' if planned == 1 else 'were'} planned"
            )
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
    """Return a text without the white space around it.

    Raises:
        ValueError: the value is not a text, or is empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {value!r}, not a text")
    return value.strip()
