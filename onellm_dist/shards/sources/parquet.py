"""`onellm shards build parquet | finevision | llava-onevision IN OUT`: tables with media inside.

IN is a `.parquet` or `.arrow` file, or a folder of them: a dataset of the Hugging Face hub
(`data/train-00000-of-00001.parquet`), one that `datasets.save_to_disk` wrote, or the parquet output
of img2dataset. Media are bytes, `{bytes, path}`, arrays of numbers, or names of files; a list with
one of them counts as one. Texts are captions, conversations, or questions with answers.

With `several=list` a row has any number of media, which its sample lists.

FineVision (`images`, `texts` of {user, assistant}) and LLaVA-OneVision-Data (`image`,
`conversations`) are the same with their columns named. Rows without a picture are a dataset of
their own: `-o modality=text`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.turns import TurnsError
from onellm_dist.shards.format.media import LISTED, make_numbered_parts
from onellm_dist.shards.format.names import make_safe_key, parse_modalities
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
from onellm_dist.shards.sources.readers.arrow_columns import (
    ArrowColumns,
    find_arrow_columns,
    infer_modality,
)
from onellm_dist.shards.sources.readers.arrow_files import (
    ArrowPart,
    ArrowRow,
    list_parts,
    read_rows,
    read_schema,
)
from onellm_dist.shards.sources.readers.arrow_media import (
    list_items,
    read_item,
    read_listed_items,
)
from onellm_dist.shards.sources.readers.conversations import clean_turns, make_turns
from onellm_dist.shards.sources.readers.img2dataset import to_plain_json
from onellm_dist.shards.sources.readers.listing import ListedFiles, list_files
from onellm_dist.shards.sources.readers.media_files import get_write_stamp
from onellm_dist.shards.sources.readers.media_rows import check_tags, parse_media_modalities
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.saved_datasets import (
    SUFFIXES,
    check_complete,
    leave_out_caches,
)
from onellm_dist.shards.sources.readers.split_names import (
    find_split,
    note_part_numbers,
    note_splits,
)
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique
from onellm_dist.shards.sources.readers.unread_media import (
    find_unread_column,
    is_content,
    list_media_parts,
)

_NO_MEDIA = "no medium: a row of the dataset with modality=text"


def plan(
    inputs: Path,
    *,
    seed: int,
    modality: str | None,
    caption_column: str | None,
    media_column: str | None,
    split: str | None,
    missing: str,
    several: str,
) -> DatasetDescription:
    """Make an input split of each row group (or some record batches).

    Raises:
        UsageError: there is no such file, or the columns do not say what they hold.
    """
    check_missing(missing)
    if several not in ("fail", "skip", "list"):
        raise UsageError(
            f"several={several} is none of fail, skip, list.",
            "it says what becomes of rows with several media.",
            "choose one.",
        )
    listed = list_files(inputs, recursive=True) if inputs.is_dir() else ListedFiles((inputs,), 0)
    root = inputs if inputs.is_dir() else inputs.parent
    tables = [p for p in listed.files if p.suffix.lower() in SUFFIXES]
    check_complete(listed.files if inputs.is_dir() else ())
    tables, notes = leave_out_caches(tables, named=not inputs.is_dir())
    if not tables:
        raise UsageError(
            f"{inputs} has no {' or '.join(SUFFIXES)}.",
            "there is nothing to build from.",
            "name the file, or the folder of a downloaded or saved dataset.",
        )
    schema = read_schema(tables[0])
    names = parse_modalities(modality) if modality else (infer_modality(tables[0], schema),)
    if several == "list" and names:
        parse_media_modalities(",".join(names))
    find_arrow_columns(tables[0], schema, names, caption_column, media_column)
    names_below = [table.relative_to(root) for table in tables]
    stems = make_keys_unique(make_safe_key(n.with_suffix("").as_posix()) for n in names_below)
    splits = (
        InputSplit(
            f"{name.as_posix()}:{part.start}",
            {
                "file": name.as_posix(),
                "part": list(part),
                "stem": stem,
                "modalities": list(names),
            },
            split or find_split(name),
            part.rows,
        )
        for table, name, stem in zip(tables, names_below, stems, strict=True)
        for part in list_parts(table)
    )
    notes += listed.make_notes((*SUFFIXES, ".json", ".md"))
    notes += note_part_numbers(tables if inputs.is_dir() else ())
    notes += () if split else note_splits(names_below)
    return DatasetDescription(names, splits, notes, dict(LISTED) if several == "list" else {})


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    modality: str | None,
    caption_column: str | None,
    media_column: str | None,
    split: str | None,
    missing: str,
    several: str,
) -> Iterator[RawSample]:
    """Read the samples of one part of a file; its media are read with the rows."""
    root = inputs if inputs.is_dir() else inputs.parent
    path, part = root / description["file"], ArrowPart(*description["part"])
    names = tuple(description["modalities"])
    columns = _find_columns(path, get_write_stamp(path), names, caption_column, media_column)
    folders = tuple(dict.fromkeys((path.parent, root)))
    read = _RowReader(path, columns, folders, names, missing == "skip", several)
    for number, row in enumerate(read_rows(path, [part]), part.start):
        where = f"{description['file']}[{number}]"
        yield read(f"{description['stem']}/{number:09d}", where, row)


@lru_cache(maxsize=64)
def _find_columns(
    path: Path, stamp: int, modalities: Sequence[str], caption: str | None, media: str | None
) -> ArrowColumns:
    return find_arrow_columns(path, read_schema(path), modalities, caption, media)


@dataclass(frozen=True)
class _RowReader:
    """Makes raw samples of rows."""

    path: Path
    columns: ArrowColumns
    folders: tuple[Path, ...]
    modalities: tuple[str, ...]
    skip_missing: bool
    several: str
    """`fail`, `skip`, or `list`: a sample has any number of media, and lists them."""

    def __call__(self, key: str, where: str, row: ArrowRow) -> RawSample:
        """Make the raw sample of a row."""
        values = row.values
        status = values.get("status")
        if row.problem is not None:
            return RawSample(key, where, problem=row.problem)
        if isinstance(status, str) and status.startswith("failed"):
            return RawSample(key, where, skip=status)  # of img2dataset
        counts = [len(list_items(values.get(c))) for c in self.columns.media]
        unread = self._find_unread(values, has_media=any(counts))
        if not self.columns.media and unread is not None:
            return RawSample(key, where, skip=f"has a medium ({unread}): not a row of text alone")
        if self.columns.media and not any(counts) and self.several != "list":
            but = "" if unread is None else f", but for {unread}, which is not read"
            return RawSample(
                key,
                where,
                skip=f"{_NO_MEDIA}{but}" if self.skip_missing else None,
                problem=None if self.skip_missing else f"missing file: the row has no medium{but}",
            )
        if unread is not None:
            problem = f"unread media: {unread} holds a medium, and is not read"
            return RawSample(key, where, problem=problem)
        if self.several == "list":
            return self._make_listed(key, where, values)
        if max(counts, default=0) > 1 and self.several == "skip":
            return RawSample(key, where, skip="several media of one kind")
        try:
            parts = self._read_media(values)
            caption, meta = self._read_texts(values)
        except BadSampleError as error:
            return RawSample(key, where, problem=error.what)
        except TurnsError as error:
            return RawSample(key, where, problem=f"malformed conversations: {error}")
        return RawSample(key, where, parts, caption, meta)

    def _find_unread(self, values: Mapping[str, Any], *, has_media: bool) -> str | None:
        """Name what holds a medium of a row besides the columns of media; None: nothing does."""
        columns = self.columns
        read = {*columns.media, columns.caption, columns.turns, *(columns.answers or ())}
        column = find_unread_column(values, read, self.modalities, has_media=has_media)
        if column is not None:
            return f"the column {column}"
        parts = list_media_parts(values.get(columns.turns) if columns.turns else None)
        held = next((kind for kind, value in parts if value is not None or not columns.media), None)
        return None if held is None else f"a content part of type {held}"

    def _make_listed(self, key: str, where: str, values: Mapping[str, Any]) -> RawSample:
        """Make the raw sample of a row with any number of media, and placeholders in its text."""
        try:
            media = [
                (name, parts)
                for name in self.modalities
                for parts in read_listed_items(
                    name, self.columns.media, values, self.path, self.folders
                )
            ]
            caption, meta = self._read_texts(values)
            parts, listed = make_numbered_parts(media)
            check_tags(meta.get("conversations", ()), listed, self.modalities)
        except BadSampleError as error:
            return RawSample(key, where, problem=error.what)
        except TurnsError as error:
            return RawSample(key, where, problem=f"malformed conversations: {error}")
        return RawSample(key, where, parts, caption, {**meta, "media": listed})

    def _read_media(self, values: Mapping[str, Any]) -> dict[str, Media]:
        parts: dict[str, Media] = {}
        for column, accepted in self.columns.media.items():
            items = list_items(values.get(column))
            if len(items) > 1:
                raise BadSampleError(
                    f"several media: {column} has {len(items)}; a sample has one of a kind "
                    "(several=skip leaves such rows out, several=list reads them all)"
                )
            for item in items:
                extension, media = read_item(item, accepted, column, self.path, self.folders)
                parts[extension] = media
        return parts

    def _read_texts(self, values: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """The caption, and the values for `.json`."""
        columns = self.columns
        used = {*columns.media, columns.caption, columns.turns, *(columns.answers or ())}
        meta = {
            k: plain
            for k, v in values.items()
            if k not in used and not is_content(v) and (plain := to_plain_json(v)) is not None
        }
        raw = values.get(columns.turns) if columns.turns else None
        if raw:
            listed = self.several == "list"
            tags = bool(columns.media) and not listed
            meta["conversations"] = clean_turns(_to_turns(raw), tags=tags, placeholders=listed)
        elif columns.answers is not None:
            question, answer = (values.get(c) for c in columns.answers)
            answer = answer[0] if isinstance(answer, list) and answer else answer
            if isinstance(question, str) and isinstance(answer, str):
                meta["conversations"] = make_turns((question.strip(), answer.strip()))
        text = values.get(columns.caption) if columns.caption else None
        if isinstance(text, int) and 0 <= text < len(columns.classes):
            text = columns.classes[text]
        if isinstance(text, list) and all(isinstance(t, str) for t in text) and text:
            meta["caption"] = text
            return None, meta
        if text is not None and not isinstance(text, str):
            raise BadSampleError(f"caption is not text: a {type(text).__name__}")
        return (text if text or "conversations" not in meta else None), meta


def _to_turns(raw: Any) -> Any:
    """Convert FineVision's list of {user, assistant} to turns; others stay as they are."""
    if isinstance(raw, str):  # a conversation that is stored as JSON text
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise TurnsError("the text is not JSON") from None
    if not isinstance(raw, list) or not all(isinstance(t, dict) for t in raw):
        return raw
    if not all({"user", "assistant"} <= t.keys() for t in raw):
        return raw
    return [{"role": role, "content": turn[role]} for turn in raw for role in ("user", "assistant")]


def _make_source(
    name: str, summary: str, *, modality: str | None, missing: str, licence: str
) -> Source:
    return Source(
        name,
        summary,
        plan=plan,
        raw_samples=raw_samples,
        options={
            "modality": Option(
                modality,
                "what the media are (image; image,audio; text: the rows without media); "
                "default: inferred from the columns",
            ),
            "caption_column": Option(None, "the column of captions"),
            "media_column": Option(None, "the column of media"),
            "split": Option(
                None, "the split of all rows; default: that in the names of files and folders"
            ),
            "missing": Option(missing, MISSING_OPTION.help),
            "several": Option(
                "fail",
                "rows with several media of one kind: fail, skip, or list (samples of the dataset "
                "have any number of media, also none, where <image> stands in their texts)",
            ),
        },
        licence=licence,
        reads_as_stored=True,
    )


SOURCES = (
    _make_source(
        "parquet",
        "parquet or Arrow files with media inside: of Hugging Face, save_to_disk, img2dataset",
        modality=None,
        missing="fail",
        licence="unknown",
    ),
    _make_source(
        "finevision",
        "FineVision: parquet of `images` and `texts`; one subset or all of them",
        modality="image",
        missing="skip",
        licence="FineVision: the licences of its sources",
    ),
    _make_source(
        "llava-onevision",
        "LLaVA-OneVision-Data: parquet of `image` and `conversations`; one subset or all of them",
        modality="image",
        missing="skip",
        licence="LLaVA-OneVision: Apache-2.0; pictures under the licences of their sources",
    ),
)
