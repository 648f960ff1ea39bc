"""`onellm shards build interleaved | m4-instruct IN OUT`: conversations with any media.

IN is one .json or .jsonl, or a folder of them, with rows of LLaVA's form (M4-Instruct, LLaVA-Video,
ShareGPT4V), of LLaMA-Factory's or ms-swift's, or with content parts (readers/media_rows.py).
Samples may have no medium, one, or several, and media stand where the texts say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.media import LISTED
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    AnnotationContext,
    find_media_folders,
    read_raw_samples,
)
from onellm_dist.shards.sources.readers.json_stream import JsonItem, read_rows, split_rows
from onellm_dist.shards.sources.readers.listing import list_files
from onellm_dist.shards.sources.readers.media_rows import parse_media_modalities, read_media_row
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.text_files import JSON_SUFFIXES
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique

_ROWS = 1000
_KEPT = ("id", "source", "data_source", "sample_id", "dataset", "metadata")
"""Values of a row that the `.json` keeps."""


def plan(
    inputs: Path, *, seed: int, modality: str, media: Path | None, missing: str
) -> DatasetDescription:
    """Divide the files into ranges of rows.

    Raises:
        UsageError: there is no such file, or an option is wrong.
    """
    check_missing(missing)
    names = parse_media_modalities(modality)
    root = inputs.parent if inputs.is_file() else inputs
    find_media_folders(root, media, ())
    if inputs.is_file():
        return DatasetDescription(
            names, split_rows(root, inputs.name, _ROWS), attributes=dict(LISTED)
        )
    listed = list_files(inputs)
    files = [p.name for p in listed.files if p.suffix.lower() in JSON_SUFFIXES]
    if not files:
        raise UsageError(
            f"{inputs} has no .json or .jsonl.",
            "the conversations are expected there.",
            "name the file, or its folder; media may lie elsewhere: -o media=FOLDER.",
        )
    stems = make_keys_unique(n.rpartition(".")[0].replace(".", "_") for n in files)
    splits = (
        split
        for name, stem in zip(files, stems, strict=True)
        for split in split_rows(inputs, name, _ROWS, stem=stem)
    )
    return DatasetDescription(names, splits, attributes=dict(LISTED))


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    modality: str,
    media: Path | None,
    missing: str,
) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    root = inputs.parent if inputs.is_file() else inputs
    folders = find_media_folders(root, media, ())
    context = AnnotationContext(root, folders, description, {})
    names = parse_media_modalities(modality)
    for item in read_rows(root, description):
        yield from read_raw_samples(lambda i: _read_row(context, i, names), item, 1, missing)


def _read_row(
    context: AnnotationContext, item: JsonItem, modalities: Sequence[str]
) -> Sequence[AnnotatedSample]:
    name: str = context.description["file"]
    stem = context.description.get("stem", name.rpartition(".")[0].replace(".", "_"))
    row = item.value
    meta: dict[str, Any] = {k: row[k] for k in _KEPT if isinstance(row.get(k), (str, int, dict))}
    return [read_media_row(context, row, f"{stem}-{item.number:07d}", modalities, meta)]


def _make_source(name: str, summary: str, modality: str, licence: str) -> Source:
    return Source(
        name,
        summary,
        plan=plan,
        raw_samples=raw_samples,
        options={
            "modality": Option(modality, "what the media may be: image,video"),
            "media": Option(None, "the folder at which the rows' paths begin; default: IN", Path),
            "missing": MISSING_OPTION,
        },
        licence=licence,
        reads_as_stored=True,
    )


SOURCES = (
    _make_source(
        "interleaved",
        "conversations with any number of media, placed by <image>, <audio>, ...: JSON or JSONL",
        "image",
        "unknown",
    ),
    _make_source(
        "m4-instruct",
        "M4-Instruct: m4_instruct_annotations.json and m4_instruct_video.json",
        "image,video",
        "CC BY 4.0; media under the licences of their sources",
    ),
)
