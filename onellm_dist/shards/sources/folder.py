"""`onellm shards build folder IN OUT`: a folder of media with captions in side files or a table.

IN is a folder or a table. A table at the folder's top level is found by its columns; without one,
captions are read from side files. The rules of names and columns are in readers/folder_files.py and
readers/folder_tables.py, and for users in shards/README.md.
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

_SPLIT_SAMPLES = 1000
"""Raw samples per input split."""


def find_raw_samples(
    inputs: Path,
    captions: Path | None,
    modality: str | None,
    caption_column: str | None,
    file_column: str | None,
) -> tuple[tuple[str, ...], list[RawSample], list[str]]:
    """Find the samples of an input folder or table.

    Args:
        inputs: the folder or table.
        captions: the user's table.
        modality: the user's modalities; None to infer them.
        caption_column: the user's column of captions.
        file_column: the user's column of files.

    Returns:
        Modalities, raw samples in their order on disk, and notes.

    Raises:
        UsageError: nothing there can be used, or the user must make a choice.
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
    """List the folder; the raw samples go to the plan, so that files may be added meanwhile.

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
    splits = (
        InputSplit(
            f"{inputs.name}:{first + 1}",
            {"raw_samples": [_to_json(c) for c in found[first : first + _SPLIT_SAMPLES]]},
            split,
            len(found[first : first + _SPLIT_SAMPLES]),
        )
        for first in range(0, len(found), _SPLIT_SAMPLES)
    )
    return DatasetDescription(modalities, splits, tuple(notes))


def raw_samples(inputs: Path, description: SplitDescription, **_: Any) -> Iterator[RawSample]:
    """Return the raw samples that the plan lists."""
    for packed in description["raw_samples"]:
        yield RawSample(**{**packed, "parts": {e: Path(p) for e, p in packed["parts"].items()}})


def _to_json(raw_sample: RawSample) -> dict[str, Any]:
    """Convert a raw sample to JSON values."""
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
            "what the media are (image; image,audio for samples with both; text for text alone); "
            "default: inferred",
        ),
        "captions": Option(
            None, "the table of files and captions, if it is not found by itself", Path
        ),
        "caption_column": Option(None, "the table's column of captions"),
        "file_column": Option(None, "the table's column of files"),
        "split": Option("train", "the split that the samples go to"),
        "shuffle": Option(
            False, "write in random order (by the seed) instead of sorting by key", bool
        ),
    },
)
