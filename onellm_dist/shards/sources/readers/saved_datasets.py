"""Datasets that Hugging Face's `datasets` saved: their tables, their splits, and what lies beside.

`save_to_disk` writes `data-*.arrow`, `dataset_info.json` and `state.json`; of a DatasetDict, such a
folder for each split beside `dataset_dict.json`. The Hub has parquet and `dataset_infos.json`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.readers.listing import list_files
from onellm_dist.shards.sources.readers.split_names import note_part_numbers
from onellm_dist.shards.sources.readers.text_files import JSON_SUFFIXES

SUFFIXES = (".parquet", ".arrow")
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""What `datasets` writes beside tables; none of it is rows."""
_STATE = "state.json"
_DICT = "dataset_dict.json"
_NUMBERED = re.compile(r"data-(\d+)-of-(\d+)\.arrow")
_AGAIN = "fetch or copy the dataset again; or name the files that are there one by one."


def is_dataset_dict(folder: Path) -> bool:
    """Check whether a folder is a saved DatasetDict, with a folder for each split."""
    return _read_splits(folder) is not None


def _read_splits(folder: Path) -> list[Any] | None:
    """Read the names of a DatasetDict's splits; None: the folder is not one."""
    value = _load(folder / _DICT)
    splits = value.get("splits") if isinstance(value, dict) else None
    return splits if isinstance(splits, list) else None


def _load(file: Path) -> Any:
    """Load a description; None: there is none, or it is not JSON."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def refuse_saved_dataset(inputs: Path, do: str) -> None:
    """Refuse a dataset of `save_to_disk`, for sources that read JSON or tables of text.

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
            f"{folder} is a dataset of Hugging Face's save_to_disk.",
            f"{described}its rows are in Arrow files, which are not read here.",
            do,
        )


def list_dataset_files(inputs: Path) -> tuple[list[Path], tuple[str, ...]]:
    """List the files that may hold the rows of a dataset.

    Tables may lie in folders below, as those of the Hub (`data/`) and of a DatasetDict's splits do.
    Beside JSON they are not looked for: a folder of media may have some.

    Args:
        inputs: the folder; or a file, which is the only one.

    Returns:
        The files, without what `datasets` writes beside tables; and notes.

    Raises:
        UsageError: a saved dataset is a selection of its rows, lacks files, has caches alone, or
            its description cannot be read.
    """
    if not inputs.is_dir():
        return _leave_out(inputs, [inputs], named=True)
    listed = list_files(inputs, recursive=True).files
    top = [p for p in listed if "/" not in p.relative_to(inputs).as_posix()]
    below = [p for p in listed if p not in set(top)]
    taken, examined = top, top
    has_json = any(p.suffix.lower() in JSON_SUFFIXES and p.name not in DESCRIPTIONS for p in top)
    if not has_json or is_dataset_dict(inputs):
        taken, examined = [*top, *(p for p in below if p.suffix.lower() in SUFFIXES)], [*listed]
    check_complete(listed, examined)
    ignored = Counter(
        p.suffix.lower()
        for p in {*below} - {*taken}
        if p.suffix.lower() in (*SUFFIXES, *JSON_SUFFIXES) and p.name not in DESCRIPTIONS
    )
    files, notes = _leave_out(inputs, sorted(taken), named=False)
    notes += note_part_numbers(files)
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
            "name the tables, or save the dataset again (save_to_disk).",
        )
    beside = DESCRIPTIONS if tables else ()
    return [p for p in listed if p not in left_out and p.name not in beside], notes


def check_complete(listed: Collection[Path], examined: Collection[Path] | None = None) -> None:
    """Check that the datasets of `save_to_disk` among some files have all of theirs.

    Their descriptions say which those are. Where there is none, the names of Arrow files say how
    many.

    Args:
        listed: all files that are there.
        examined: those among them that belong to the datasets to check; default: all.

    Raises:
        UsageError: a file or a split is missing, or a description cannot be parsed, as one that
            was cut short; rows would be lost without a word.
    """
    present, files = {*listed}, listed if examined is None else examined
    numbered = dict[Path, list[PurePath]]()
    for path in files:
        if path.suffix.lower() == ".arrow":
            numbered.setdefault(path.parent, []).append(path)
    for path in (p for p in files if p.name in (_STATE, _DICT)):
        folder = path.parent
        # Other programs have a state.json too.
        beside = {folder / "dataset_info.json", folder.parent / _DICT}
        if path.name == _DICT or folder in numbered or not beside.isdisjoint(present):
            _require_json(path)
        if path.name == _STATE:
            expected = [folder / name for name in sorted(_read_state(folder) or ())]
        else:
            expected = [folder / str(split) / _STATE for split in _read_splits(folder) or ()]
        if missing := [file for file in expected if file not in present]:
            name = missing[0].relative_to(folder).as_posix()
            raise _make_error(folder, f"{path.name} lists {name}", len(missing), len(expected))
    for folder, tables in numbered.items():
        if _read_state(folder) is None:
            _check_numbers(folder, tables)


def _require_json(file: Path) -> None:
    """Refuse a description that is there and cannot be read."""
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{file} cannot be read ({error}).",
            "it lists the files of the dataset; if some are missing, their rows would be lost.",
            _AGAIN,
        ) from None


def _check_numbers(folder: Path, tables: Iterable[PurePath]) -> None:
    """Check that `data-00000-of-00002.arrow` is not alone, where no description lists it."""
    found = dict[int, set[int]]()
    for table in tables:
        if match := _NUMBERED.fullmatch(table.name):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    for total, numbers in sorted(found.items()):
        if len(numbers) < total:
            first = next(n for n in range(total) if n not in numbers)
            name = f"data-{first:05d}-of-{total:05d}.arrow"
            said = f"the names of its Arrow files count {name}"
            raise _make_error(folder, said, total - len(numbers), total)


def _make_error(folder: Path, lists: str, missing: int, total: int) -> UsageError:
    return UsageError(
        f"{folder}: {lists}, which is missing ({missing} of {format_count(total, 'file')}).",
        "the rows in it would be lost.",
        _AGAIN,
    )


def leave_out_caches(
    tables: Sequence[Path], *, named: bool = False
) -> tuple[list[Path], tuple[str, ...]]:
    """Keep the files that are a dataset's own; `datasets` leaves caches of its work beside them.

    Args:
        tables: the files.
        named: whether the user named them, which the name `cache-...` alone does not revoke.

    Raises:
        UsageError: a saved dataset is a selection of its rows, which the files do not show.
    """
    kept, caches = list[Path](), Counter[str]()
    arrows = {table for table in tables if table.suffix.lower() == ".arrow"}
    states = {folder: _read_state(folder) for folder in {table.parent for table in arrows}}
    for table in tables:
        is_arrow = table in arrows
        own = states[table.parent] if is_arrow else None
        is_cache = is_arrow and not named and table.name.startswith("cache-")
        if (own is not None and table.name not in own) or is_cache:
            caches["cache files of datasets left out"] += 1
        else:
            kept.append(table)
    return kept, tuple(f"{what}: {n}" for what, n in caches.items())


def _read_state(folder: Path) -> frozenset[str] | None:
    """Read which files a dataset of `save_to_disk` has; None: the folder is not one.

    Raises:
        UsageError: it has an indices mapping.
    """
    state = _load(folder / _STATE)
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list):
        return None
    if state.get("_indices_data_files"):
        raise UsageError(
            f"{folder} is a selection or another order of its rows (an indices mapping).",
            "its files hold the rows before the selection.",
            "save it again after datasets' flatten_indices().",
        )
    return frozenset(str(f.get("filename") if isinstance(f, dict) else f) for f in files)
