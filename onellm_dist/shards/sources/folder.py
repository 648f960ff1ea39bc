"""`onellm shards build folder IN OUT`: a folder of media with captions in side files or in a table.

IN is a folder (a table at its top level is found by its columns; else captions are side files), or the table itself.
The rules of names and columns stand in folder_files.py, folder_tables.py, and for users in shards/README.md.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.names import parse_modalities
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.folder_files import find_side_file_samples
from onellm_dist.shards.sources.readers.folder_tables import find_table, read_table_samples

_GROUP = 1000
"""Candidates a group."""


def find_raw_samples(
    inputs: Path,
    captions: Path | None,
    modality: str | None,
    caption_column: str | None,
    file_column: str | None,
) -> tuple[tuple[str, ...], list[RawSample], list[str]]:
    """(modalities, raw_samples in their order on disk, notes) of an input folder or table.

    Raises:
        UsageError: nothing usable there, or a choice that the user must make.
    """
    wanted = parse_modalities(modality) if modality is not None else None
    if captions is not None and not captions.is_file() and (inputs / captions).is_file():
        captions = inputs / captions
    if captions is not None and not captions.is_file():
        raise UsageError(
            f"{captions}: there is no such table.",
            "captions cannot be read.",
            "check the option captions.",
        )
    root = inputs if inputs.is_dir() else inputs.parent
    table = captions or (find_table(inputs) if inputs.is_dir() else inputs)
    if table is not None:
        found = read_table_samples(table, root, wanted, caption_column, file_column)
    else:
        found = find_side_file_samples(inputs, wanted)
    if not found[1]:
        ignored = f" ({'; '.join(found[2])})" if found[2] else ""
        raise UsageError(
            f"{inputs}: no samples{f' of modality {modality}' if modality else ''} found{ignored}.",
            "there is nothing to build from.",
            "put captions beside the media (cat.jpg + cat.txt), or name a table: -o captions=FILE.",
        )
    return found


def plan(
    inputs: Path,
    *,
    seed: int,
    modality: str | None,
    captions: Path | None,
    caption_column: str | None,
    file_column: str | None,
    split: str,
    shuffle: bool,
) -> DatasetDescription:
    """Lists the folder; the raw_samples themselves go to the plan, so that what is found later has the same order.

    Raises:
        UsageError: the input or an option cannot be used.
    """
    if not isinstance(inputs, Path):
        raise UsageError(
            f"{inputs} is remote.", "source 'folder' lists local folders only.", "mount or copy it."
        )
    modalities, found, notes = find_raw_samples(
        inputs, captions, modality, caption_column, file_column
    )
    if shuffle:
        random.Random(seed).shuffle(found)
    groups = (
        InputSplit(
            f"{inputs.name}:{first + 1}",
            {"raw_samples": [_packed(c) for c in found[first : first + _GROUP]]},
            split,
            len(found[first : first + _GROUP]),
        )
        for first in range(0, len(found), _GROUP)
    )
    return DatasetDescription(modalities, groups, tuple(notes))


def raw_samples(inputs: Path, description: SplitDescription, **_: Any) -> Iterator[RawSample]:
    """The raw_samples that stand in the plan."""
    for packed in description["raw_samples"]:
        yield RawSample(**{**packed, "parts": {e: Path(p) for e, p in packed["parts"].items()}})


def _packed(raw_sample: RawSample) -> dict[str, Any]:
    """As JSON values."""
    return {
        **{k: v for k, v in vars(raw_sample).items() if v is not None},
        "parts": {e: str(p) for e, p in raw_sample.parts.items()},
    }


SOURCE = Source(
    name="folder",
    summary="a folder of media with captions in side .txt/.json files or in a CSV, TSV or JSONL",
    plan=plan,
    raw_samples=raw_samples,
    options={
        "modality": Option(
            None,
            "what the media are (image; image,audio for samples with both; text for text alone); inferred if not given",
        ),
        "captions": Option(
            None, "the table of files and captions, where it is not found by itself", Path
        ),
        "caption_column": Option(None, "the table's column of captions"),
        "file_column": Option(None, "the table's column of files"),
        "split": Option("train", "the split that the samples go to"),
        "shuffle": Option(
            False, "write in random order (by the seed) instead of sorted by key", bool
        ),
    },
)
