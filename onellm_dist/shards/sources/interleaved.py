"""`onellm shards build interleaved | m4-instruct | sharegpt IN OUT`: conversations with any media.

IN is one .json or .jsonl, or a folder of them, whose names say the splits (`test.jsonl`). Rows have
LLaVA's form (M4-Instruct, LLaVA-Video, ShareGPT4V), LLaMA-Factory's or ms-swift's, or content parts
(readers/media_rows.py). Samples may have no medium, one, or several, and media stand where the
texts say so. `sharegpt` without the option `modality` is text alone, and `<image>` in its texts
belongs to a web page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
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
from onellm_dist.shards.sources.readers.conversations import clean_turns, require_conversation
from onellm_dist.shards.sources.readers.json_stream import JsonItem, read_rows, split_rows
from onellm_dist.shards.sources.readers.listing import list_files
from onellm_dist.shards.sources.readers.media_rows import (
    parse_media_modalities,
    read_media_row,
    require_text_alone,
)
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.saved_datasets import (
    DESCRIPTIONS,
    refuse_saved_dataset,
)
from onellm_dist.shards.sources.readers.split_names import (
    find_split,
    note_splits,
)
from onellm_dist.shards.sources.readers.text_files import JSON_SUFFIXES
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique

_ROWS = 1000
_KEPT = ("id", "source", "data_source", "sample_id", "dataset", "metadata")
"""Values of a row that the `.json` keeps."""


def plan(
    inputs: Path, *, seed: int, modality: str | None, media: Path | None, missing: str
) -> DatasetDescription:
    """Divide the files into ranges of rows.

    Raises:
        UsageError: there is no such file, or an option is wrong.
    """
    check_missing(missing)
    do = "onellm shards build parquet IN OUT reads it, with "
    do += "-o modality=text." if modality is None else f"-o several=list -o modality={modality}."
    refuse_saved_dataset(inputs, do)
    names = () if modality is None else parse_media_modalities(modality)
    attributes = dict(LISTED) if names else {}
    root = inputs.parent if inputs.is_file() else inputs
    find_media_folders(root, media, ())
    if inputs.is_file():
        return DatasetDescription(
            names, split_rows(root, inputs.name, _ROWS), attributes=attributes
        )
    listed = list_files(inputs)
    files = [
        p.name
        for p in listed.files
        if p.suffix.lower() in JSON_SUFFIXES and p.name not in DESCRIPTIONS
    ]
    if not files:
        raise UsageError(
            f"{inputs} has no .json or .jsonl.",
            "the conversations are expected there.",
            "name the file, or its folder; media may lie elsewhere: -o media=FOLDER. Of tables: "
            + do,
        )
    stems = make_keys_unique(n.rpartition(".")[0].replace(".", "_") for n in files)
    splits = (
        split
        for name, stem in zip(files, stems, strict=True)
        for split in split_rows(inputs, name, _ROWS, stem=stem, split=find_split(PurePath(name)))
    )
    notes = () if names else listed.make_notes(JSON_SUFFIXES)
    notes += note_splits(map(PurePath, files))
    return DatasetDescription(names, splits, notes, attributes)


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
    for item in read_rows(context.inputs, description):
        yield from read_raw_samples(lambda i: _read_row(context, i, names), item, 1, missing)


def make_context(
    inputs: Path, description: SplitDescription, media: Path | None
) -> AnnotationContext:
    """Where the media of a range of rows lie."""
    root = inputs.parent if inputs.is_file() else inputs
    return AnnotationContext(root, find_media_folders(root, media, ()), description, {})


def make_row_key(description: SplitDescription, item: JsonItem) -> str:
    """The key of a row's sample: the name of the file, and the number of the row."""
    name: str = description["file"]
    stem = description.get("stem", name.rpartition(".")[0].replace(".", "_"))
    return f"{stem}-{item.number:07d}"


def _read_row(
    context: AnnotationContext, item: JsonItem, modalities: Sequence[str]
) -> Sequence[AnnotatedSample]:
    row, key = item.value, make_row_key(context.description, item)
    if not modalities:
        return [_read_text(row, key)]
    meta: dict[str, Any] = {k: row[k] for k in _KEPT if isinstance(row.get(k), (str, int, dict))}
    return [read_media_row(context, row, key, modalities, meta)]


def _read_text(row: Mapping[str, Any], key: str) -> AnnotatedSample:
    """Make the sample of a row without media.

    Raises:
        BadSampleError: the row names media, without which its texts would be about nothing.
    """
    require_text_alone(row)
    turns = clean_turns(require_conversation(row), tags=False)
    meta = {"id": row["id"]} if isinstance(row.get("id"), (str, int)) else {}
    return AnnotatedSample(key, {}, turns, meta=meta)


def _make_source(name: str, summary: str, modality: str | None, licence: str) -> Source:
    return Source(
        name,
        summary,
        plan=plan,
        raw_samples=raw_samples,
        options={
            "modality": Option(
                modality,
                "what the media may be: image,video"
                + ("" if modality else "; default: text alone"),
            ),
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
    _make_source(
        "sharegpt",
        "conversations of {from, value}: text alone, or with -o modality=image lists of media",
        None,
        "unknown",
    ),
)
