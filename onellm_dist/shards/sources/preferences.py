"""`onellm shards build preferences IN OUT`: conversations with a chosen and a rejected answer.

IN is one .json, .jsonl, .parquet or .arrow, or a folder of them. Media are named as in
`interleaved`, or stand in the table (bytes, `{bytes, path}`); the forms of rows are listed in
readers/preference_rows.py. For `train.loss: dpo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.media import LISTED
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.interleaved import make_context, make_row_key, plan
from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    find_media_folders,
    read_raw_samples,
)
from onellm_dist.shards.sources.readers.arrow_files import ArrowPart, list_parts
from onellm_dist.shards.sources.readers.arrow_files import read_rows as read_table_rows
from onellm_dist.shards.sources.readers.json_stream import JsonItem, read_rows
from onellm_dist.shards.sources.readers.media_rows import parse_media_modalities
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.preference_rows import read_preference_row
from onellm_dist.shards.sources.readers.saved_datasets import (
    SUFFIXES,
    list_dataset_files,
    refuse_saved_dataset,
)
from onellm_dist.shards.sources.readers.split_names import (
    find_split,
    format_names,
    list_joined_splits,
    note_splits,
)
from onellm_dist.shards.sources.readers.text_files import JSON_SUFFIXES
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    modality: str | None,
    media: Path | None,
    missing: str,
) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    context = make_context(inputs, description, media)
    names = () if modality is None else parse_media_modalities(modality)

    def read(item: JsonItem) -> list[AnnotatedSample]:
        return [read_preference_row(context, item.value, make_row_key(description, item), names)]

    if "part" not in description:
        for item in read_rows(context.inputs, description):
            yield from read_raw_samples(read, item, 1, missing)
        return
    name, part = description["file"], ArrowPart(*description["part"])
    for number, row in enumerate(read_table_rows(context.inputs / name, [part]), part.start):
        item = JsonItem(f"{name}[{number}]", number, "", row.values)
        if row.problem is not None:
            yield RawSample(make_row_key(description, item), item.where, problem=row.problem)
            continue
        yield from read_raw_samples(read, item, 1, missing)


def _plan(
    inputs: Path, *, seed: int, modality: str | None, media: Path | None, missing: str
) -> DatasetDescription:
    listed, notes = list_dataset_files(inputs)
    found = [path for path in listed if path.suffix.lower() in SUFFIXES]
    if not found:
        refuse_saved_dataset(inputs, "name its folder, if that holds its Arrow files.")
        planned = plan(inputs, seed=seed, modality=modality, media=media, missing=missing)
        return replace(planned, notes=(*notes, *planned.notes))
    if other := [path.name for path in listed if path.suffix.lower() in JSON_SUFFIXES]:
        raise UsageError(
            f"{inputs} has tables ({found[0].name}) and JSON ({other[0]}).",
            "which of them are the rows is not clear.",
            "name the file, or a folder of one kind.",
        )
    check_missing(missing)
    root = inputs if inputs.is_dir() else inputs.parent
    tables = [path.relative_to(root).as_posix() for path in found]
    for split, joined in list_joined_splits(map(PurePath, tables)).items():
        raise UsageError(
            f"{inputs} has several splits that would be {split}: {format_names(joined)}.",
            "they may share rows, and a pair in two of them would be used twice.",
            "name the one to read, its file or folder, or move its files to a folder of their own; "
            "or build each, and mix them (data.mixture).",
        )
    notes += note_splits(map(PurePath, tables))
    find_media_folders(root, media, ())
    names = () if modality is None else parse_media_modalities(modality)
    stems = make_keys_unique(n.rpartition(".")[0].replace(".", "_") for n in tables)
    splits = (
        InputSplit(
            f"{name}:{part.start}",
            {"file": name, "part": list(part), "stem": stem},
            find_split(PurePath(name)),
            part.rows,
        )
        for name, stem in zip(tables, stems, strict=True)
        for part in list_parts(root / name)
    )
    return DatasetDescription(names, splits, notes, attributes=dict(LISTED) if names else {})


SOURCE = Source(
    "preferences",
    "conversations with a chosen and a rejected answer, for DPO: JSON, JSONL or parquet",
    plan=_plan,
    raw_samples=raw_samples,
    options={
        "modality": Option(None, "what the media may be: image,video; default: text alone"),
        "media": Option(None, "the folder at which the rows' paths begin; default: IN", Path),
        "missing": MISSING_OPTION,
    },
    licence="unknown",
    reads_as_stored=True,
)
