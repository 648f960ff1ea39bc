"""`onellm shards build audiocaps IN OUT`: AudioCaps' tables of captions and the clips.

The tables are {train,val,test}.csv with the columns audiocap_id, youtube_id, start_time, caption.
Clips of ten seconds are found by name in any folder or zip archive below IN:
`<youtube_id>_<start_time>`, `Y<youtube_id>`, `<audiocap_id>`, AudioSet's
`<youtube_id>_<start>_<end>` in milliseconds, or `<youtube_id>`, as .wav, .flac, .mp3, .ogg, .opus,
.m4a or .aac.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.names import make_safe_key
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.conversations import make_caption_turns
from onellm_dist.shards.sources.readers.delimited import (
    CSV,
    RowRange,
    find_row_ranges,
    read_header,
    read_rows,
)
from onellm_dist.shards.sources.readers.media_files import require_file, resolve_below
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.pool import MediaPool, find_media, find_pool

_COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
_SPLITS = ("train", "val", "test")
_ROWS = 1000
_CLIP_SECONDS = 10


def _get_suffixes() -> tuple[str, ...]:
    return tuple(f".{e}" for e in next(iter(get_modality("audio").required_parts.values())))


def plan(
    inputs: Path, *, seed: int, annotations: Path | None, splits: str, missing: str
) -> DatasetDescription:
    """Divide the tables into ranges of rows.

    Raises:
        UsageError: a table or the clips are missing.
    """
    check_missing(missing)
    wanted = [s.strip() for s in splits.split(",")]
    if (unknown := [s for s in wanted if s not in _SPLITS]) or (
        annotations is not None and len(wanted) > 1
    ):
        raise UsageError(
            f"splits={splits}: "
            f"{f'no split {unknown[0]}' if unknown else 'one table is named for several'}.",
            "each split has a table of its own.",
            f"use {', '.join(_SPLITS)}.",
        )
    tables = [
        (
            s,
            require_file(
                inputs,
                annotations,
                (f"{s}.csv", f"dataset/{s}.csv"),
                f"AudioCaps' rows of {s}",
                "annotations",
            ),
        )
        for s in wanted
    ]
    for _, table in tables:
        names, _ = read_header(resolve_below(inputs, table), CSV)
        if not set(_COLUMNS) <= set(names):
            raise UsageError(
                f"{table} has the columns {', '.join(names)}.",
                "it is not a table of AudioCaps.",
                f"AudioCaps' tables have {', '.join(_COLUMNS)}.",
            )
    pool = find_pool(inputs, _get_suffixes())
    if not pool:
        raise UsageError(
            f"{inputs} has no {', '.join(_get_suffixes())} or .zip.",
            "there are captions but no clips.",
            "download the clips too.",
        )
    return DatasetDescription(
        ("audio",), (g for s, t in tables for g in _make_splits(inputs, s, t, pool))
    )


def _make_splits(inputs: Path, split: str, table: str, pool: MediaPool) -> Iterator[InputSplit]:
    names, start = read_header(resolve_below(inputs, table), CSV)
    for found in find_row_ranges(resolve_below(inputs, table), CSV, _ROWS, start):
        description = {"table": table, "names": names, "range": list(found), "pool": pool.to_json()}
        yield InputSplit(f"{table}:{found.line}", description, split, found.size)


def raw_samples(
    inputs: Path, description: SplitDescription, *, missing: str, **_: Any
) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    pool = MediaPool.from_json(description["pool"])
    for line, row, problem in read_rows(
        resolve_below(inputs, description["table"]),
        CSV,
        RowRange(*description["range"]),
        description["names"],
    ):
        where = f"{description['table']}:{line}"
        if problem is not None:
            yield RawSample(f"row-{line:07d}", where, problem=problem)
            continue
        key = make_safe_key(row["audiocap_id"].strip() or f"row-{line:07d}")
        found = find_media(inputs, pool, _list_stems(row), _get_suffixes())
        if found is None:
            lost = f"missing file: no clip of {row['youtube_id']} at {row['start_time']} s"
            yield (
                RawSample(key, where, problem=lost)
                if missing == "fail"
                else RawSample(key, where, skip="media was not fetched")
            )
            continue
        suffix, media = found
        meta = {
            "youtube_id": row["youtube_id"],
            "start_time": row["start_time"],
            "conversations": make_caption_turns("audio", row["caption"]),
        }
        yield RawSample(key, where, {suffix[1:]: media}, row["caption"], meta)


def _list_stems(row: Mapping[str, str]) -> list[str]:
    """Names that a clip may have, the most specific first."""
    video, start = row["youtube_id"].strip(), row["start_time"].strip()
    stems = [f"{prefix}{video}_{start}" for prefix in ("", "Y")]
    if start.replace(".", "", 1).isdecimal():
        first = round(float(start))
        stems += [
            f"{video}_{first * 1000}_{(first + _CLIP_SECONDS) * 1000}",
            f"{video}_{first}_{first + _CLIP_SECONDS}",
        ]
    return [*stems, f"Y{video}", video, row["audiocap_id"].strip()]


SOURCE = Source(
    "audiocaps",
    "AudioCaps: {train,val,test}.csv and the clips under any usual name; one sample per caption",
    plan=plan,
    raw_samples=raw_samples,
    options={
        "annotations": Option(None, "the table, if it is not train.csv", Path),
        "splits": Option("train", f"what is built, separated by commas: {', '.join(_SPLITS)}"),
        "missing": MISSING_OPTION,
    },
    licence="MIT (captions); clips under YouTube's terms",
    reads_as_stored=True,
)
