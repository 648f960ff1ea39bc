"""`onellm shards build webvid IN OUT`: WebVid, as a CSV with a tree of videos or as tars.

    results_2M_train.csv            videoid,contentUrl,duration,page_dir,name
    results_2M_val.csv              the same, split val
    videos/<page_dir>/<videoid>.mp4

    00000.tar, 00000.parquet, 00000_stats.json      video2dataset's: {key}.mp4, .txt, .json

The CSV's durations (`PT00H00M11S`) are sometimes wrong. They are stored as they are, with their
value in seconds if it can be read, and decide nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
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
from onellm_dist.shards.sources.readers.delimited import (
    CSV,
    RowRange,
    find_row_ranges,
    read_header,
    read_rows,
)
from onellm_dist.shards.sources.readers.img2dataset import (
    UNFINISHED_OPTION,
    ReadText,
    find_column,
    find_tars,
    read_tar_samples,
    split_tars,
)
from onellm_dist.shards.sources.readers.listing import list_files
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.named_files import find_named_file

_COLUMNS = ("videoid", "page_dir", "name")
_DURATION = re.compile(r"P(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)")
_VALIDATION = re.compile(r"(?:^|_)(?:val|validation|test)(?:_|\.|$)", re.IGNORECASE)


def parse_duration(text: str) -> float | None:
    """Convert `PT00H01M11S` to 71.0 seconds; None if the text is not a duration."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or match.lastindex is None:
        return None
    hours, minutes, rest = (float(v or 0) for v in match.groups())
    return 3600 * hours + 60 * minutes + rest


def plan(
    inputs: Path, *, seed: int, rows: int, videos: str, missing: str, unfinished: str
) -> DatasetDescription:
    """Divide the CSVs into ranges of rows, or make an input split of each tar.

    Raises:
        UsageError: there is neither a CSV of WebVid nor a tar.
    """
    check_missing(missing)
    if rows < 1:
        raise UsageError(
            f"rows={rows} is below 1.", "an input split has rows.", "the default is 5000."
        )
    listed = list_files(inputs)
    tables = listed.select((".csv",))
    if not tables:
        splits, notes = split_tars(inputs, find_tars(inputs), unfinished)
        return DatasetDescription(("video",), splits, notes)
    headers = {}
    for table in tables:
        names, start = read_header(table, CSV)
        if not set(_COLUMNS) <= set(names):
            raise UsageError(
                f"{table}: its columns are {', '.join(names)}.",
                f"WebVid's have {', '.join(_COLUMNS)}: they say where media and captions are.",
                "remove other CSVs from this folder.",
            )
        headers[table.name] = (names, start)
    return DatasetDescription(
        ("video",),
        chain.from_iterable(
            _split_table(inputs / t, names, start, rows) for t, (names, start) in headers.items()
        ),
        listed.make_notes((".csv",)),
    )


def _split_table(
    table: Path, names: Sequence[str], start: RowRange, rows: int
) -> Iterator[InputSplit]:
    split = "val" if _VALIDATION.search(table.stem) else "train"
    for part in find_row_ranges(table, CSV, rows, start):
        description = {"table": table.name, "columns": list(names), "range": list(part)}
        yield InputSplit(f"{table.name}:{part.line}", description, split, part.size)


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    rows: int,
    videos: str,
    missing: str,
    unfinished: str,
) -> Iterator[RawSample]:
    """Read the samples of one range of rows, or of one tar."""
    if "tar" in description:
        yield from read_tar_samples(
            inputs, description, get_modality("video").required_parts["video"], _choose_caption
        )
        return
    for line, row, problem in read_rows(
        inputs / description["table"], CSV, RowRange(*description["range"]), description["columns"]
    ):
        where = f"{description['table']}:{line}"
        name = row.get("videoid", "")
        wrong = problem or (
            f"unreadable row: the videoid is {name!r}" if not name or "/" in name else None
        )
        if wrong is not None:
            yield RawSample(
                f"{make_safe_key(description['table'])}-{line:09d}", where, problem=wrong
            )
            continue
        file = _find_video(inputs / videos, f"{row['page_dir']}/{name}.mp4")
        skip = "media was not fetched" if missing == "skip" and not file.is_file() else None
        yield RawSample(
            make_safe_key(name), where, {"mp4": file}, row["name"], _make_meta(row), skip=skip
        )


def _find_video(folder: Path, name: str) -> Path:
    """Find a video whose name may be stored in the other Unicode form."""
    found = None if name.isascii() else find_named_file([folder], name)
    return folder / name if found is None else found


def _make_meta(row: Mapping[str, str]) -> dict[str, Any]:
    meta: dict[str, Any] = {k: v for k, v in row.items() if v and k not in ("name", "contentUrl")}
    if row.get("contentUrl"):
        meta["url"] = row["contentUrl"]
    length = parse_duration(row.get("duration", ""))
    return meta if length is None else {**meta, "duration_seconds": length}


def _choose_caption(row: Mapping[str, Any], text: ReadText) -> list[str | None]:
    found = find_column(row, ("caption", "name", "text"))
    return [found if isinstance(found, str) else text()]


SOURCE = Source(
    name="webvid",
    summary="WebVid: CSV with a tree of mp4 files, or tars, parquet and stats of video2dataset",
    plan=plan,
    raw_samples=raw_samples,
    places=("videos",),
    options={
        "rows": Option(5000, "rows of a CSV per input split", int),
        "videos": Option(
            "videos", "the folder of the page_dir folders, relative to IN (. is IN itself)"
        ),
        "missing": MISSING_OPTION,
        "unfinished": UNFINISHED_OPTION,
    },
    licence="WebVid terms: research only, never redistribute (watermarked)",
    reads_as_stored=True,
)
