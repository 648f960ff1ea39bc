"""Splits by the names of files: `train-00000-of-00002.parquet`, `test.jsonl`.

A word of a name stands between `-`, `_`, `.`, spaces and digits, as for Hugging Face's `datasets`
(5.2, `data_files.py`), whose words `split_folders.py` has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath, PurePosixPath
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.shards.sources.readers.split_folders import SPLIT_FOLDERS

_WORD = re.compile(r"[^-_. 0-9]+")
_PART = re.compile(
    r"(.*?)[-_.]?(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?(?:\.[a-z]+)?\.(?:parquet|arrow)", re.IGNORECASE
)
"""A part as the Hub numbers them; of an older push_to_hub with a hash behind."""
_NUMBER = re.compile(
    r"(?<![a-z0-9])(?=[0-9a-f]*[0-9])[0-9a-f]{4,}(?![a-z0-9])|[0-9]+", re.IGNORECASE
)
"""What distinguishes the parts of one split: numbers, hashes, UUIDs."""
_CONVERTED = re.compile(r"0\d{3}")
"""A table as the Hub converts it: `0000.parquet` (`refs/convert/parquet`)."""
_LAST = {"eval": "test", "evaluation": "test"}
"""Words that say a split where no other does: `human_eval_train` is of train."""
_WORDS = {**SPLIT_FOLDERS, **_LAST}
_SHOWN = 6


def find_split(table: PurePath) -> str:
    """Find the split in a file's name (`train-00000-of-00001`), else in those of its folders.

    A folder's name says it by its first word (`test_prefs/`).

    Args:
        table: the file, relative to the folder that is read.
    """
    path = PurePosixPath(table.as_posix())
    if split := _find_word(_WORD.findall(path.stem)):
        return split
    folders = (_find_word(_WORD.findall(name)[:1]) for name in reversed(path.parts[:-1]))
    return next((split for split in folders if split), "train")


def _find_word(words: Sequence[str]) -> str | None:
    known = [word.lower() for word in words if word.lower() in _WORDS]
    first = next((word for word in known if word not in _LAST), known[0] if known else "")
    return _WORDS.get(first)


def _find_split_name(table: PurePath) -> tuple[str, str]:
    """Find what the split of a file is called, in a form to compare and as it stands there.

    Both are empty where nothing says so. The folder of a saved split is called as it is, and so is
    that of a table that the Hub converted.
    """
    path = PurePosixPath(table.as_posix())
    folders, part = path.parts[:-1], _PART.fullmatch(path.name)
    if part and part[1].lower() not in ("", "part", "data"):
        return part[1].lower(), part[1]
    if part and part[1].lower() == "part":  # Spark's
        return "", ""
    if not part and _find_word(_WORD.findall(path.stem)):
        return _leave_numbers_out(path.stem), path.stem
    if part or path.suffix.lower() == ".arrow" or _CONVERTED.fullmatch(path.stem):
        name = folders[-1] if folders else ""
        return ("", "") if name.lower() == "data" else (name.lower(), name)
    named = (folder for folder in reversed(folders) if _find_word(_WORD.findall(folder)[:1]))
    name = next(named, "")
    return _leave_numbers_out(name), name


def _leave_numbers_out(name: str) -> str:
    return "_".join(filter(None, re.split(r"[-_. ]+", _NUMBER.sub("", name.lower()))))


def list_joined_splits(tables: Iterable[PurePath]) -> dict[str, list[str]]:
    """List the splits that files of several splits become, with the names of those.

    ultrafeedback_binarized has `train_prefs`, `train_sft` and `train_gen`: all become `train`, and
    a row may stand in each.

    Args:
        tables: the files, relative to the folder that is read.
    """
    names = dict[str, dict[str, str]]()
    for table in tables:
        name, shown = _find_split_name(table)
        if name:
            names.setdefault(find_split(table), {}).setdefault(name, shown)
    return {split: sorted(found.values()) for split, found in names.items() if len(found) > 1}


def format_names(names: list[str]) -> str:
    """List names with commas; only the first of many, and how many there are."""
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def note_joined_splits(tables: Iterable[PurePath]) -> tuple[str, ...]:
    """Make a note of each of `list_joined_splits`."""
    return tuple(
        f"the split {split} joins {format_names(names)}, which may share rows"
        for split, names in list_joined_splits(tables).items()
    )


def note_part_numbers(tables: Iterable[Any]) -> tuple[str, ...]:
    """Make a note of each table of the Hub whose parts are not each there once.

    Missing ones are not refused: a few parts of a large data set may be all that is wanted.

    Args:
        tables: the files, on this machine or in a store.
    """
    found = dict[tuple[str, str], dict[int, Counter[int]]]()
    for table in tables:
        match = _PART.fullmatch(table.name)
        if match and table.suffix.lower() == ".parquet":
            key = str(table.parent), match[1]
            numbers = found.setdefault(key, {}).setdefault(int(match[3]), Counter())
            numbers[int(match[2])] += 1
    several = Counter(name for _, name in found)
    notes = []
    for (folder, name), totals in sorted(found.items()):
        where = PurePosixPath(folder).name
        called = (f"{where}/{name}".rstrip("/") if several[name] > 1 else name) or "the table"
        for total, numbers in sorted(totals.items()):
            if missing := total - sum(number < total for number in numbers):
                notes.append(
                    f"{called}: {missing} of its {format_count(total, 'parquet file')} "
                    f"{'is' if missing == 1 else 'are'} not there; fetch the rest if all rows are "
                    "wanted"
                )
        if len(totals) > 1 or any(max(numbers.values()) > 1 for numbers in totals.values()):
            notes.append(
                f"{called}: its parts are there in several numberings or copies, which may repeat "
                "rows"
            )
    return tuple(notes)
