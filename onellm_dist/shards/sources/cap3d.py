"""`onellm shards build cap3d IN OUT`: Cap3D's captions of Objaverse with its point clouds.

Two forms are read, Cap3D's own and PointLLM's copy:

    Cap3D_automated_Objaverse_full.csv          uid,caption without a header
    <anywhere>/<uid>.ply | .pt | .npy           unpacked clouds of 16,384 coloured points, and/or
    PointCloud_zips/compressed_pcs_00.zip, ...  the archives as downloaded (members found by name)

    PointLLM_brief_description_660K_filtered.json   [{object_id, conversation_type, conversations}]
    8192_npy/<object_id>_8192.npy                   [8192, 6]: x, y, z, red, green, blue in [0, 1]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.turns import CONVERSATION_KEYS, TurnsError, find_conversation, parse_turns
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.format.names import make_safe_key
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    Media,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers import json_stream
from onellm_dist.shards.sources.readers.clouds import TensorCloud
from onellm_dist.shards.sources.readers.delimited import CSV, RowRange, find_row_ranges, read_rows
from onellm_dist.shards.sources.readers.listing import list_files
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.pool import MediaPool, find_media, find_pool

SUFFIXES = (".npy", ".pt", ".ply")
"""The preferred first: NumPy is read fastest."""
_ROWS = 2000


def plan(
    inputs: Path, *, seed: int, captions: str | None, clouds: str | None, missing: str
) -> DatasetDescription:
    """Divide the table into ranges of rows.

    Raises:
        UsageError: there is no table or several, or there are no clouds.
    """
    check_missing(missing)
    table = _find_table(inputs, captions)
    pool = find_pool(inputs, SUFFIXES, clouds)
    if not pool:
        where = inputs if clouds is None else inputs / clouds
        raise UsageError(
            f"{where} has no {', '.join(SUFFIXES)} or .zip.",
            "there are captions but no clouds.",
            "download the clouds too.",
        )
    return DatasetDescription(("point",), _make_splits(inputs, table, pool))


def _find_table(inputs: Path, given: str | None) -> str:
    if given is not None:
        if not (inputs / given).is_file():
            raise UsageError(
                f"{inputs / given}: there is no such table.",
                "captions cannot be read.",
                "check the option captions.",
            )
        return given
    listed = list_files(inputs)
    found = [p.name for suffix in (".csv", ".json") for p in listed.select((suffix,))]
    if len(found) != 1:
        there = f"{len(found)} tables: {', '.join(found)}" if found else "no table"
        raise UsageError(
            f"{inputs} has {there}.",
            "captions are in Cap3D_automated_Objaverse_full.csv or "
            "PointLLM_brief_description_660K_filtered.json.",
            "put one there, or name it: -o captions=FILE (relative to IN).",
        )
    return found[0]


def _make_splits(inputs: Path, table: str, pool: MediaPool) -> Iterator[InputSplit]:
    if table.lower().endswith(".json"):
        yield from json_stream.split_rows(inputs, table, _ROWS, pool=pool.to_json())
        return
    for rows in find_row_ranges(inputs / table, CSV, _ROWS):
        yield InputSplit(
            f"{table}:{rows.line}",
            {"table": table, "range": list(rows), "pool": pool.to_json()},
            count=rows.size,
        )


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    captions: str | None,
    clouds: str | None,
    missing: str,
) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    pool = MediaPool.from_json(description["pool"])
    rows = (
        _read_captions(inputs, description)
        if "table" in description
        else _read_conversations(inputs, description)
    )
    for where, uid, caption, meta, problem in rows:
        key = make_safe_key(uid or where.replace(":", "-").replace("[", "-").rstrip("]"))
        if problem is not None:
            yield RawSample(key, where, problem=problem)
            continue
        found = find_media(inputs, pool, (uid, f"{uid}_8192"), SUFFIXES)
        if found is None:
            lost = f"missing file: {uid}{{{','.join(SUFFIXES)}}} is in no folder and no archive"
            yield (
                RawSample(key, where, problem=lost)
                if missing == "fail"
                else RawSample(key, where, skip="media was not fetched")
            )
            continue
        yield RawSample(key, where, make_cloud_parts(*found, uid), caption, meta)


def make_cloud_parts(suffix: str, media: Media, name: str) -> dict[str, Media]:
    """Make the part of a cloud's file: `.pt` becomes `.npy`, others stay as they are."""
    return {"npy": TensorCloud(media, f"{name}.pt")} if suffix == ".pt" else {suffix[1:]: media}


_CloudRow = tuple[str, str, str | None, Mapping[str, Any], str | None]
"""Location, uid, caption, metadata, problem."""


def _read_captions(inputs: Path, description: SplitDescription) -> Iterator[_CloudRow]:
    for line, row, problem in read_rows(
        inputs / description["table"], CSV, RowRange(*description["range"]), ("uid", "caption")
    ):
        uid = row.get("uid", "").strip()
        wrong = problem or (
            f"unreadable row: the uid is {uid!r}" if not uid or "/" in uid else None
        )
        yield (
            f"{description['table']}:{line}",
            "" if wrong else uid,
            row.get("caption"),
            {"uid": uid},
            wrong,
        )


def _read_conversations(inputs: Path, description: SplitDescription) -> Iterator[_CloudRow]:
    for where, _, _, row in json_stream.read_rows(inputs, description):
        uid = row.get("object_id") if isinstance(row, dict) else None
        if not isinstance(uid, str) or not uid or "/" in uid:
            yield where, "", None, {}, "unreadable row: no object_id"
            continue
        answer = _get_answer(find_conversation(row))
        meta = {k: v for k, v in row.items() if k not in CONVERSATION_KEYS}
        yield (
            where,
            uid,
            answer,
            meta,
            None
            if answer is not None
            else "malformed conversations: not one question and its answer",
        )


def _get_answer(raw: Any) -> str | None:
    """The description of the object: the answer to the only question."""
    try:
        turns = parse_turns(raw, all_modalities())
    except TurnsError:
        return None
    return turns[1].text if [turn.role for turn in turns] == ["user", "assistant"] else None


SOURCE = Source(
    name="cap3d",
    summary="Cap3D: CSV without header and .ply, .pt or .npy clouds or their zips; "
    "or PointLLM's copy: JSON and 8192_npy",
    plan=plan,
    raw_samples=raw_samples,
    places=("clouds", "captions"),
    options={
        "captions": Option(None, "the table, relative to IN, if there are several"),
        "clouds": Option(
            None,
            "the folder of the clouds and their zips, relative to IN; "
            "default: all of IN, also zips of pictures",
        ),
        "missing": MISSING_OPTION,
    },
    licence="ODC-By (Cap3D); CC-BY-NC-SA 4.0 (PointLLM's copy); objects under their own licences",
)
