"""`onellm shards build folder IN OUT`: a folder of media with captions in side files or in a table.

IN is a folder (a table at its top level is found by its columns; else captions are side files), or the table itself.
The rules of names and columns stand in folder_files.py, folder_tables.py, and for users in shards/README.md.
"""

from __future__ import annotations

import random
from pathlib import Path

from onellm_dist.errors import UsageError
from onellm_dist.shards.naming import parse_modalities
from onellm_dist.shards.pipeline import TooManyFailures, write_quarantine, write_samples
from onellm_dist.shards.sources.base import BuildReport, Candidate, Option, Source
from onellm_dist.shards.sources.folder_files import side_file_candidates
from onellm_dist.shards.sources.folder_tables import find_table, table_candidates
from onellm_dist.shards.staging import QUARANTINE
from onellm_dist.shards.writer import MAX_BYTES, MAX_SAMPLES, DatasetWriter


def find_candidates(
    inputs: Path, captions: Path | None, modality: str | None, caption_column: str | None, file_column: str | None
) -> tuple[tuple[str, ...], list[Candidate], list[str]]:
    """(modalities, candidates in their order on disk, notes) of an input folder or table.

    Raises:
        UsageError: nothing usable there, or a choice that the user must make.
    """
    wanted = parse_modalities(modality) if modality is not None else None
    if captions is not None and not captions.is_file() and (inputs / captions).is_file():
        captions = inputs / captions
    if captions is not None and not captions.is_file():
        raise UsageError(f"{captions}: there is no such table.", "captions cannot be read.", "check the option captions.")
    root = inputs if inputs.is_dir() else inputs.parent
    table = captions or (find_table(inputs) if inputs.is_dir() else inputs)
    if table is not None:
        found = table_candidates(table, root, wanted, caption_column, file_column)
    else:
        found = side_file_candidates(inputs, wanted)
    if not found[1]:
        ignored = f" ({'; '.join(found[2])})" if found[2] else ""
        raise UsageError(
            f"{inputs}: no samples{f' of modality {modality}' if modality else ''} found{ignored}.",
            "there is nothing to build from.",
            "put captions beside the media (cat.jpg + cat.txt), or name a table: -o captions=FILE.",
        )
    return found


def build(
    inputs: Path,
    out: Path,
    *,
    workers: int,
    seed: int,
    name: str,
    modality: str | None,
    captions: Path | None,
    caption_column: str | None,
    file_column: str | None,
    split: str,
    licence: str,
    check: bool,
    max_failures: float,
    max_samples: int,
    max_bytes: int,
    shuffle: bool,
) -> BuildReport:
    """Builds one dataset from a folder; see SOURCE for the options.

    Raises:
        UsageError: the input or an option cannot be used.
        TooManyFailures: more than `max_failures` of the samples are bad.
    """
    if not 0 <= max_failures <= 1:
        raise UsageError(f"max_failures={max_failures} is not within 0 and 1.", "it is a share of the samples.", "0.1 allows one in ten.")
    modalities, candidates, notes = find_candidates(inputs, captions, modality, caption_column, file_column)
    if shuffle:
        random.Random(seed).shuffle(candidates)
    writer = DatasetWriter(
        out, name=name, modalities=modalities, licence=licence, source=SOURCE.name, max_samples=max_samples, max_bytes=max_bytes
    )
    try:
        with writer:
            samples, bad = write_samples(writer, split, candidates, check=check, workers=workers, max_failures=max_failures)
    except TooManyFailures as error:
        write_quarantine(out / QUARANTINE, error.bad)
        raise
    if bad:
        write_quarantine(out / QUARANTINE, bad)
    return BuildReport(samples, tuple(bad), tuple(notes))


SOURCE = Source(
    name="folder",
    summary="a folder of media with captions in side .txt/.json files or in a CSV, TSV or JSONL",
    build=build,
    options={
        "modality": Option(
            None, "what the media are (image; image,audio for samples with both; text for text alone); inferred if not given"
        ),
        "captions": Option(None, "the table of files and captions, where it is not found by itself", Path),
        "caption_column": Option(None, "the table's column of captions"),
        "file_column": Option(None, "the table's column of files"),
        "name": Option(None, "the dataset's name in sample ids; the output folder's name if not given"),
        "split": Option("train", "the split that the samples go to"),
        "licence": Option("unknown", "goes to the manifest"),
        "check": Option(True, "decode every media once; bad ones are left out and listed in quarantine.jsonl", bool),
        "max_failures": Option(0.1, "largest share of bad samples, 0 to 1; beyond it nothing is built", float),
        "max_samples": Option(MAX_SAMPLES, "most samples a shard", int),
        "max_bytes": Option(MAX_BYTES, "most bytes of content a shard", int),
        "shuffle": Option(False, "write in random order (by the seed) instead of sorted by key", bool),
    },
)
