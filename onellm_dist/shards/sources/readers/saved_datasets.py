"""Data sets that Hugging Face's `datasets` saved: their tables, their splits, and what lies beside.

`save_to_disk` writes `data-*.arrow`, `dataset_info.json` and `state.json`; of a DatasetDict, such a
folder for each split beside `dataset_dict.json`. The Hub has parquet and `dataset_infos.json`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.readers.listing import list_files
from onellm_dist.shards.sources.readers.split_folders import SPLIT_FOLDERS
from onellm_dist.shards.sources.readers.text_files import JSON_SUFFIXES

SUFFIXES = (".parquet", ".arrow")
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""What `datasets` writes beside tables; none of it is rows."""
_STATE = "state.json"
_DICT = "dataset_dict.json"


def is_dataset_dict(folder: Path) -> bool:
    """Check whether a folder is a saved DatasetDict, with a folder for each split."""
    return _read_splits(folder) is not None


def _read_splits(folder: Path) -> list[Any] | None:
    """Read the names of a DatasetDict's splits; None: the folder is not one."""
    try:
        value = json.loads((folder / _DICT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    splits = value.get("splits") if isinstance(value, dict) else None
    return splits if isinstance(splits, list) else None


def refuse_saved_dataset(inputs: Path, do: str) -> None:
    """Refuse a data set of `save_to_disk`, for sources that read JSON or tables of text.

    Its descriptions are JSON, which such a source would take for rows.

    Args:
        inputs: the input folder, or a file.
        do: what to do instead.

    Raises:
        UsageError: it is one, or one of its descriptions.
    """
    folder = inputs.parent if inputs.name in DESCRIPTIONS else inputs
    if is_dataset_dict(folder) or _read_state(folder) is not None:
        described = "" if folder == inputs else f"{inputs.name} describes it: "
        raise UsageError(
            f"{folder} is a data set of Hugging Face's save_to_disk.",
            f"{described}its rows are in Arrow files, which are not read here.",
            do,
        )


def list_dataset_files(inputs: Path) -> tuple[list[Path], tuple[str, ...]]:
    """List the files that may hold the rows of a data set.

    Tables may lie in folders below, as those of the Hub (`data/`) and of a DatasetDict's splits do.
    Beside JSON they are not looked for: a folder of media may have some.

    Args:
        inputs: the folder; or a file, which is the only one.

    Returns:
        The files, without what `datasets` writes beside tables; and notes.

    Raises:
        UsageError: a saved data set is a selection of its rows, lacks files, or has caches alone.
    """
    if not inputs.is_dir():
        return _leave_out(inputs, [inputs], named=True)
    listed = list_files(inputs, recursive=True).files
    top = [p for p in listed if "/" not in p.relative_to(inputs).as_posix()]
    below = [p for p in listed if p not in set(top)]
    taken = top
    if not any(p.suffix.lower() in JSON_SUFFIXES and p.name not in DESCRIPTIONS for p in top):
        check_complete(listed)
        taken = [*top, *(p for p in below if p.suffix.lower() in SUFFIXES)]
    ignored = Counter(
        p.suffix.lower()
        for p in {*below} - {*taken}
        if p.suffix.lower() in (*SUFFIXES, *JSON_SUFFIXES) and p.name not in DESCRIPTIONS
    )
    files, notes = _leave_out(inputs, sorted(taken), named=False)
    if ignored:
        what = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(ignored.items()))
        notes += (f"ignored in folders below: {what}; name such a folder to read it",)
    return files, notes


def _leave_out(
    inputs: Path, listed: Sequence[Path], *, named: bool
) -> tuple[list[Path], tuple[str, ...]]:
    """Leave out what `datasets` writes beside tables."""
    tables = [path for path in listed if path.suffix.lower() in SUFFIXES]
    own, notes = leave_out_caches(tables, named=named)
    left_out = {*tables} - {*own}
    if tables and not own:
        raise UsageError(
            f"{inputs} has no tables but a cache of datasets ({tables[0].name}).",
            "a cache may repeat rows, or lack some.",
            "name the tables, or save the data set again (save_to_disk).",
        )
    beside = DESCRIPTIONS if tables else ()
    return [p for p in listed if p not in left_out and p.name not in beside], notes


def check_complete(listed: Collection[Path]) -> None:
    """Check that the data sets of `save_to_disk` among some files have all of theirs.

    Raises:
        UsageError: a file or a split is missing; its rows would be lost without a word.
    """
    present = {*listed}
    for path in listed:
        folder, expected = path.parent, list[Path]()
        if path.name == _STATE:
            expected = [folder / name for name in sorted(_read_state(folder) or ())]
        elif path.name == _DICT:
            expected = [folder / str(split) / _STATE for split in _read_splits(folder) or ()]
        if missing := [file for file in expected if file not in present]:
            raise UsageError(
                f"{folder}: {path.name} lists {missing[0].relative_to(folder).as_posix()}, which "
                f"is missing ({len(missing)} of {format_count(len(expected), 'file')}).",
                "the rows in it would be lost.",
                "fetch or copy the data set again; or name the files that are there one by one.",
            )


def leave_out_caches(
    tables: Sequence[Path], *, named: bool = False
) -> tuple[list[Path], tuple[str, ...]]:
    """Keep the files that are a data set's own; `datasets` leaves caches of its work beside them.

    Args:
        tables: the files.
        named: whether the user named them, which the name `cache-...` alone does not revoke.

    Raises:
        UsageError: a saved data set is a selection of its rows, which the files do not show.
    """
    kept, caches = list[Path](), Counter[str]()
    for table in tables:
        is_arrow = table.suffix.lower() == ".arrow"
        own = _read_state(table.parent) if is_arrow else None
        is_cache = is_arrow and not named and table.name.startswith("cache-")
        if (own is not None and table.name not in own) or is_cache:
            caches["cache files of datasets left out"] += 1
        else:
            kept.append(table)
    return kept, tuple(f"{what}: {n}" for what, n in caches.items())


@lru_cache(maxsize=64)
def _read_state(folder: Path) -> frozenset[str] | None:
    """Read which files a data set of `save_to_disk` has; None: the folder is not one.

    Raises:
        UsageError: it has an indices mapping.
    """
    try:
        state = json.loads((folder / _STATE).read_bytes())
        names = frozenset(f["filename"] for f in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if state.get("_indices_data_files"):
        raise UsageError(
            f"{folder} is a selection or another order of its rows (an indices mapping).",
            "its files hold the rows before the selection.",
            "save it again after datasets' flatten_indices().",
        )
    return names


def find_split(table: PurePath) -> str:
    """Find the split in a file's name (`train-00000-of-00001`) or in its folder's.

    The folder of an Arrow file is called as its split, which has the name of none of the three
    where there are several (`test_prefs`).
    """
    words = re.split(r"[-_.]", table.stem.lower())
    folders = list(reversed(PurePosixPath(table.as_posix()).parts[:-1]))
    if table.suffix.lower() == ".arrow" and folders:
        words += re.split(r"[-_.]", folders[0].lower())
    named = (SPLIT_FOLDERS.get(w) for w in (*words, *(f.lower() for f in folders)))
    return next((split for split in named if split is not None), "train")
