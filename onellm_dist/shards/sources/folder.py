"""`onellm shards build folder IN OUT`: a folder of media with captions in side files or a table.

IN is a folder or a table. A table at the folder's top level is found by its columns; without one,
the folders `train/`, `validation/` and `test/` are splits, each with a table of its own, side files
or class folders; else captions are read from side files. The rules of names and columns are in
readers/folder_files.py and readers/folder_tables.py, and for users in docs/howto/data.md.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.media import LISTED
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
from onellm_dist.shards.sources.readers.folder_lists import read_listed_samples
from onellm_dist.shards.sources.readers.folder_tables import (
    count_unused,
    find_table,
    read_table_samples,
)
from onellm_dist.shards.sources.readers.media_files import resolve_below
from onellm_dist.shards.sources.readers.media_rows import parse_media_modalities
from onellm_dist.shards.sources.readers.saved_datasets import refuse_saved_dataset
from onellm_dist.shards.sources.readers.split_folders import find_split_folders
from onellm_dist.shards.sources.readers.split_names import (
    note_joined_split,
    note_train_folders,
)
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique

_SPLIT_SAMPLES = 1000
"""Raw samples per input split."""


@dataclass(frozen=True)
class FolderOptions:
    """The options that say where captions and files are."""

    captions: Path | None = None
    """The user's table."""
    caption_column: str | None = None
    file_column: str | None = None
    media: Path | None = None
    """The folder at which the table's paths begin."""
    class_captions: bool = False
    """Whether class folders name captions, where nothing else has any."""
    several: str = "fail"
    """What becomes of rows with several media of one kind: `fail`, or `list`."""


Found = tuple[tuple[str, ...], list[RawSample], list[str]]
"""Modalities, raw samples in their order on disk, and notes."""


def find_raw_samples(
    inputs: Path,
    modalities: tuple[str, ...] | None,
    options: FolderOptions,
    split: str | None = None,
) -> tuple[tuple[str, ...], dict[str | None, list[RawSample]], list[str]]:
    """Find the samples of an input folder or table.

    Args:
        inputs: the folder or table.
        modalities: the user's; None to infer them.
        options: where captions and files are.
        split: the user's; None: folders say it, or it is train.

    Returns:
        Modalities; split to raw samples, where the split None is the one that the user chooses; and
        notes.

    Raises:
        UsageError: nothing there can be used, or the user must make a choice.
    """
    root = inputs if inputs.is_dir() else inputs.parent
    columns, lists = (options.caption_column, options.file_column), options.several == "list"
    table = _choose_table(inputs, options.captions) or (
        find_table(inputs, *columns, lists=lists) if inputs.is_dir() else inputs
    )
    folders, left = (
        ({}, ())
        if table is not None or modalities == ()
        else find_split_folders(inputs, lambda folder: _has_table(folder, *columns, lists=lists))
    )
    if not folders:
        found = _find_in_folder(root, root, table, modalities, options)
        media = root if options.media is None else resolve_below(root, options.media)
        unsplit = note_train_folders(_count_folders(found[1], media)) if split is None else ()
        return found[0], {None: found[1]}, [*found[2], *unsplit]
    samples = dict[str | None, list[RawSample]]()
    notes = [
        f"{name}/ has no media, and no table or several: nothing is read from it" for name in left
    ]
    for name, several in folders.items():
        for folder in several:
            table = find_table(folder, *columns, lists=lists)
            modalities, some, said = _find_in_folder(folder, root, table, modalities, options)
            samples.setdefault(name, []).extend(some)
            said.extend(_note_files_elsewhere(folder, table, some))
            notes += [f"{folder.name}/ (split {name}): {line}" for line in said]
        if len(several) > 1 and split is None:
            notes.append(note_joined_split(name, [f"{folder.name}/" for folder in several]))
    return modalities or (), _renumber_keys(samples), notes


def _has_table(folder: Path, *columns: str | None, lists: bool) -> bool:
    """Whether a folder without media has the table of a split; several may be results."""
    try:
        return find_table(folder, *columns, lists=lists) is not None
    except UsageError:
        return False


def _note_files_elsewhere(
    folder: Path, table: Path | None, samples: Sequence[RawSample]
) -> Iterator[str]:
    """Say so if the table of a split folder names no file in it: it may be a list of results."""
    files = [part for sample in samples for part in sample.parts.values() if isinstance(part, Path)]
    own = Path(os.path.normpath(folder))
    inside = (own in Path(os.path.normpath(file)).parents for file in files)  # ../train/7.png
    if table is not None and files and not any(inside):
        yield f"all files that {table.name} names lie elsewhere; is it a list of results?"


def _count_folders(samples: Sequence[RawSample], root: Path) -> dict[PurePath, int]:
    """Count the samples of each folder below one, by their first files, else by their keys."""
    counts = Counter[str]()
    for sample in samples:
        file = next((part for part in sample.parts.values() if isinstance(part, Path)), None)
        counts[os.path.dirname(root / sample.key if file is None else file)] += 1
    folders = {
        PurePath(os.path.relpath(name or os.curdir, root)): count for name, count in counts.items()
    }
    return {folder: count for folder, count in folders.items() if ".." not in folder.parts}


def _choose_table(inputs: Path, captions: Path | None) -> Path | None:
    """Return the table that the user names; None: none is named.

    Raises:
        UsageError: there is no such table.
    """
    if captions is not None and not captions.is_file():
        if not (inputs / captions).is_file():
            raise UsageError(
                f"{captions}: there is no such table.",
                "captions cannot be read.",
                "check the option captions.",
            )
        return inputs / captions
    return captions


def _find_in_folder(
    folder: Path,
    root: Path,
    table: Path | None,
    modalities: tuple[str, ...] | None,
    options: FolderOptions,
) -> Found:
    """Find the samples of one folder; keys are relative to `root`."""
    if options.several == "list":
        found = _list_media(folder, root, table, modalities, options)
    elif table is None:
        found = find_side_file_samples(folder, modalities, class_captions=options.class_captions)
        if folder != root:
            found = (found[0], [_put_below(folder.name, c) for c in found[1]], found[2])
    else:
        media = None if options.media is None else resolve_below(root, options.media)
        found = read_table_samples(
            table, root, modalities, options.caption_column, options.file_column, media
        )
        if folder.resolve() in table.resolve().parents:
            found[2].extend(_list_unused(folder, table, found[1]))
    if not found[1]:
        ignored = f" ({'; '.join(found[2])})" if found[2] else ""
        wanted = f" of modality {','.join(modalities) or 'text'}" if modalities is not None else ""
        raise UsageError(
            f"{folder}: no samples{wanted} found{ignored}.",
            "there is nothing to build from.",
            "put captions beside the media (cat.jpg + cat.txt), or name a table: -o captions=FILE.",
        )
    return found


def _list_media(
    folder: Path,
    root: Path,
    table: Path | None,
    modalities: tuple[str, ...] | None,
    options: FolderOptions,
) -> Found:
    """Find the samples of a table whose rows have any number of media.

    Raises:
        UsageError: there is no table, or no modality is given.
    """
    if table is None or not modalities:
        raise UsageError(
            f"{folder}: several=list without {'a table' if table is None else 'modality='}.",
            "samples then have the media that their rows list, of the modalities that you name.",
            "name both: -o modality=image,audio -o captions=FILE.",
        )
    parse_media_modalities(",".join(modalities))
    folders = (
        tuple(dict.fromkeys((table.parent, root)))
        if options.media is None
        else (resolve_below(root, options.media),)
    )
    columns = options.caption_column, options.file_column
    samples = read_listed_samples(table, folders, modalities, *columns)
    inside = folder.resolve() in table.resolve().parents
    return modalities, samples, list(_list_unused(folder, table, samples)) if inside else []


def _list_unused(folder: Path, table: Path, samples: Sequence[RawSample]) -> Iterator[str]:
    """Say what lies in a folder that its table does not name."""
    used = {os.path.normpath(str(p)) for sample in samples for p in sample.parts.values()}
    unused, hidden = count_unused(folder, used | {os.path.normpath(table)})
    if unused:
        listed = ", ".join(f"{n} x {s}" for s, n in unused.most_common(8))
        yield f"not named by {table.name}: {listed}"
    if hidden:
        yield f"hidden files and folders skipped: {hidden}"


def _put_below(folder: str, sample: RawSample) -> RawSample:
    return RawSample(**{**vars(sample), "key": f"{folder}/{sample.key}"})


def _renumber_keys(
    samples: Mapping[str | None, list[RawSample]],
) -> dict[str | None, list[RawSample]]:
    """Make keys unique over all splits: rows of two tables may have the same."""
    keys = iter(make_keys_unique(s.key for some in samples.values() for s in some))
    return {
        split: [RawSample(**{**vars(sample), "key": next(keys)}) for sample in some]
        for split, some in samples.items()
    }


def plan(
    inputs: Path,
    *,
    seed: int,
    modality: str | None,
    split: str | None,
    shuffle: bool,
    **options: Any,
) -> DatasetDescription:
    """List the folder; the raw samples go to the plan, so that files may be added meanwhile.

    Raises:
        UsageError: the input or an option cannot be used.
    """
    if not isinstance(inputs, Path):
        raise UsageError(
            f"{inputs} is remote.", "source 'folder' lists local folders only.", "mount or copy it."
        )
    chosen = FolderOptions(**options)
    if chosen.several not in ("fail", "list"):
        raise UsageError(
            f"several={chosen.several} is neither fail nor list.",
            "it says what becomes of rows with several media.",
            "choose one.",
        )
    refuse_saved_dataset(inputs, "onellm shards build parquet IN OUT reads it, split by split.")
    modalities, found, notes = find_raw_samples(
        inputs, parse_modalities(modality) if modality is not None else None, chosen, split
    )
    if split is not None:
        found = {split: [sample for some in found.values() for sample in some]}
    for some in found.values():
        if shuffle:
            random.Random(seed).shuffle(some)
    splits = (
        InputSplit(
            f"{inputs.name}{f'/{name}' if name is not None and split is None else ''}:{first + 1}",
            {"raw_samples": [_to_json(c) for c in some[first : first + _SPLIT_SAMPLES]]},
            name or "train",
            len(some[first : first + _SPLIT_SAMPLES]),
        )
        for name, some in found.items()
        for first in range(0, len(some), _SPLIT_SAMPLES)
    )
    attributes = dict(LISTED) if chosen.several == "list" else {}
    return DatasetDescription(modalities, splits, tuple(notes), attributes)


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
    summary="a folder of media with captions in side .txt/.json files or in a CSV, TSV or JSON",
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
        "media": Option(
            None, "the folder at which the table's paths begin; default: the table's, then IN", Path
        ),
        "caption_column": Option(None, "the table's column of captions"),
        "file_column": Option(None, "the table's column of files"),
        "class_captions": Option(
            False,
            "if no sample has a text and each lies in a folder of its class (cat/, dog/): the "
            "folder's name is the caption",
            bool,
        ),
        "several": Option(
            "fail",
            "rows of a table with several media of one kind: fail, or list (samples of the dataset "
            "have any number of media, also none, where <image> stands in their texts)",
        ),
        "split": Option(
            None,
            "the split that all samples go to; default: that of the folders train/, validation/ "
            "(val/, valid/, dev/) and test/ (eval/) if there are no others, else train",
        ),
        "shuffle": Option(
            False, "write in random order (by the seed) instead of sorting by key", bool
        ),
    },
    reads_as_stored=True,
)
