"""Splits by the names of files: `train-00000-of-00002.parquet`, `test.jsonl`.

A word of a name stands between `-`, `_`, `.`, spaces and digits, as for Hugging Face's `datasets`
(5.2, `data_files.py`), whose words `split_folders.py` has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePath, PurePosixPath
from typing import Any, NamedTuple

from onellm_dist.common.counts import format_count
from onellm_dist.shards.sources.readers.split_folders import DATA_FOLDER, SPLIT_FOLDERS

_WORD = re.compile(r"[^-_. 0-9]+")
_PART = re.compile(
    r"(.*?)[-_.]?(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?(?:\.[a-z]+)?\.(?:parquet|arrow)", re.IGNORECASE
)
"""A part as the Hub numbers them; of an older push_to_hub with a hash behind."""
_UUID = re.compile(r"(?<![a-z0-9])[0-9a-f]{8}[-_](?:[0-9a-f]{4}[-_]){3}[0-9a-f]{12}(?![a-z0-9])")
_HEX = re.compile(r"[0-9a-f]{4,}")
_DIGITS = re.compile(r"\d+")
_FIRST_CONVERTED = re.compile(r"0\d{3}")
_CONVERTED = re.compile(r"\d{4,}")
"""A table as the Hub converts it: `0000.parquet` (`refs/convert/parquet`). `2019.parquet` may be a
year, if no first one stands beside it."""
_LAST = ("eval", "evaluation")
"""Words that say a split where no other does: `human_eval_train` is of train. In a folder's name
only the first word may be one: `lm-eval/` may hold anything."""
_SHOWN = 6


class _Named(NamedTuple):
    """A file, and what its split is called."""

    path: PurePosixPath
    name: str
    """Name of the split as the file's path has it; empty where nothing says so."""
    is_whole: bool
    """Whether the name is the split's alone, without numbers or hashes of parts."""


def find_split(table: PurePath) -> str:
    """Find the split in a file's name (`train-00000-of-00001`), else in those of its folders.

    Any word of a folder's name says it (`coco-val/`); of `_LAST` only the first.

    Args:
        table: the file, relative to the folder that is read.
    """
    path = PurePosixPath(table.as_posix())
    if split := _find_word(_list_words(path.stem)):
        return split
    folders = (_find_in_folder(name) for name in reversed(path.parts[:-1]))
    return next((split for split in folders if split), "train")


def _list_words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _find_word(words: Sequence[str]) -> str | None:
    known = [word for word in words if word in SPLIT_FOLDERS]
    first = next((word for word in known if word not in _LAST), known[0] if known else "")
    return SPLIT_FOLDERS.get(first)


def _find_in_folder(name: str) -> str | None:
    words = _list_words(name)
    return _find_word(words[:1] + [word for word in words[1:] if word not in _LAST])


def _name_tables(tables: Iterable[PurePath]) -> list[_Named]:
    paths = [PurePosixPath(table.as_posix()) for table in tables]
    converted = {path.parent for path in paths if _FIRST_CONVERTED.fullmatch(path.stem)}
    return [_Named(path, *_find_split_name(path, converted)) for path in paths]


def _find_split_name(path: PurePosixPath, converted: Collection[PurePosixPath]) -> tuple[str, bool]:
    """Find the name of `_Named`, and whether it is the split's alone.

    The folder of a saved split is called as the split is, and so is that of a table that the Hub
    converted.

    Args:
        path: the file.
        converted: folders of tables that the Hub converted.
    """
    folders, part = path.parts[:-1], _PART.fullmatch(path.name)
    before = part[1].lower() if part else None
    if part and before not in ("", "part", "data"):
        return part[1], True
    if not part and _find_word(_list_words(path.stem)):
        return path.stem, False
    is_saved = before is not None or path.suffix.lower() == ".arrow"
    if path.parent in converted and _CONVERTED.fullmatch(path.stem):
        is_saved = True
    # Spark calls its parts so in any folder: en/ and de/ do not become splits by it.
    if is_saved and before != "part" and folders and folders[-1].lower() != DATA_FOLDER:
        return folders[-1], True
    return next((name for name in reversed(folders) if _find_in_folder(name)), ""), False


def _leave_numbers_out(names: Iterable[str]) -> dict[str, str]:
    """Map names to what is left without that which distinguishes the parts of one split.

    That is numbers, UUIDs and hashes. Letters alone are a hash (`train-deadbeef`) where another
    name has one with a digit in that place, of that length.
    """
    words = {name: _split_name(name) for name in names}
    shapes = {
        name: tuple(f"#{len(word)}" if _HEX.fullmatch(word) else word for word in found)
        for name, found in words.items()
    }
    hashes = {
        (shapes[name], place)
        for name, found in words.items()
        for place, word in enumerate(found)
        if _HEX.fullmatch(word) and not word.isalpha()
    }
    return {
        name: "_".join(w for place, w in enumerate(found) if (shapes[name], place) not in hashes)
        for name, found in words.items()
    }


def _split_name(name: str) -> list[str]:
    """List the words of a name, hashes among them, without numbers."""
    words = re.split(r"[\W_]+", _UUID.sub("", name))
    found = (
        word if _HEX.fullmatch(word) and not word.isdigit() else _DIGITS.sub("", word)
        for word in words
    )
    return [word for word in found if word]


def list_joined_splits(tables: Iterable[PurePath]) -> dict[str, list[str]]:
    """List the splits that files of several splits become, with the names of those.

    ultrafeedback_binarized has `train_prefs`, `train_sft` and `train_gen`: all become `train`, and
    a row may stand in each.

    Args:
        tables: the files, relative to the folder that is read.
    """
    named = [table for table in _name_tables(tables) if table.name]
    whole = {table.name.lower() for table in named if table.is_whole}
    short = _leave_numbers_out({table.name.lower() for table in named} - whole)
    names = dict[str, dict[str, str]]()
    for path, name, _ in named:
        form = short.get(name.lower(), name.lower())
        names.setdefault(find_split(path), {}).setdefault(form, name)
    return {split: sorted(found.values()) for split, found in names.items() if len(found) > 1}


def format_names(names: list[str]) -> str:
    """List names with commas; only the first of many, and how many there are."""
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def note_splits(tables: Iterable[PurePath]) -> tuple[str, ...]:
    """Make a note of each of `list_joined_splits`, and of what else names leave open.

    Args:
        tables: the files, relative to the folder that is read.
    """
    listed = list(tables)
    joined = list_joined_splits(listed).items()
    return (
        *(note_joined_split(split, names) for split, names in joined),
        *_note_forms(listed),
        *_note_unused_words(listed),
        *_note_later_words(listed),
    )


def note_joined_split(split: str, names: list[str]) -> str:
    """Make a note of a split that several become."""
    return f"the split {split} joins {format_names(names)}, which may share rows"


def _note_forms(tables: Iterable[PurePath]) -> list[str]:
    """Make a note of tables that exist in two formats: of the same name, in the same folder.

    The folder `data/` counts as the one around it: `train.parquet` and `data/train-00000-of-00002`.
    Their rows are read twice if one was converted to the other, which the names leave open.
    """
    found = dict[tuple[str, str], set[str]]()
    for table in tables:
        path = PurePosixPath(table.as_posix())
        part = _PART.fullmatch(path.name)
        own = part[1] if part else path.stem
        form = f"numbered {path.suffix.lower()}" if part else path.suffix.lower()
        folders = (name for name in path.parts[:-1] if name.lower() != DATA_FOLDER)
        called = str(PurePosixPath(*folders, own)).lower()
        found.setdefault((find_split(path), called), set()).add(form)
    names = dict[str, list[str]]()
    for (_, called), forms in found.items():
        if len(forms) > 1:
            names.setdefault(" and ".join(sorted(forms)), []).append(called)
    return [
        f"there in two formats, {forms}, which may repeat rows: {format_names(several)}"
        for forms, several in names.items()
    ]


def _note_unused_words(tables: Iterable[PurePath]) -> list[str]:
    """Make a note of folders that may be a split's by a word that does not count in its place."""
    names = dict[str, None]()
    for table in tables:
        path = PurePosixPath(table.as_posix())
        if _find_word(_list_words(path.stem)) or any(map(_find_in_folder, path.parts[:-1])):
            continue
        found = (name for name in path.parts[:-1] if _find_word(_list_words(name)))
        names.update(dict.fromkeys(f"{name}/" for name in found))
    if not names:
        return []
    return [
        f"the rows in {format_names(sorted(names))} are of train: eval or evaluation says a "
        "folder's split only as the first word of its name"
    ]


def _note_later_words(tables: Iterable[PurePath]) -> list[str]:
    """Make a note of folders that are held out by a later word of their name.

    Beside a folder of `train` that is the custom (`coco-train/`, `coco-val/`); `web-dev/` may be
    meant otherwise.
    """
    paths = [PurePosixPath(table.as_posix()) for table in tables]
    trained = {
        path.parts[:depth]
        for path in paths
        for depth, name in enumerate(path.parts[:-1])
        if _find_in_folder(name) == "train"
    }
    names = dict[str, dict[str, None]]()
    for path in paths:
        folders = reversed(list(enumerate(path.parts[:-1])))
        depth, name = next(((d, n) for d, n in folders if _find_in_folder(n)), (0, ""))
        is_first = bool(_find_word(_list_words(name)[:1]))
        if not name or is_first or path.parts[:depth] in trained:
            continue
        split = _find_in_folder(name)
        if split and split != "train" and not _find_word(_list_words(path.stem)):
            names.setdefault(split, {})[f"{name}/"] = None
    return [
        f"the rows in {format_names(sorted(several))} are of {split}, by a word of the folder's "
        "name; rename it if they are to be trained on"
        for split, several in names.items()
    ]


def note_train_folders(samples: Mapping[PurePath, int]) -> tuple[str, ...]:
    """Make a note of folders whose names say another split, where all samples are of train.

    Args:
        samples: folder, relative to the one that is read, to how many samples it has.
    """
    counts = Counter[str]()
    for folder, count in samples.items():
        words = ((name, _find_word(_list_words(name))) for name in reversed(folder.parts))
        name, split = next(((n, split) for n, split in words if split), ("", "train"))
        if split != "train":
            counts[f"{name}/"] += count
    if not counts:
        return ()
    return (
        f"{format_count(counts.total(), 'sample')} in {format_names(sorted(counts))} "
        f"{'is' if counts.total() == 1 else 'are'} of train: folders become splits where IN, "
        "or its data/, has no table, and media only in train/, validation/, test/ and the like",
    )


def note_part_numbers(tables: Iterable[Any]) -> tuple[str, ...]:
    """Make a note of each table of the Hub whose parts are not each there once.

    Missing ones are not refused: a few parts of a large dataset may be all that is wanted. Some
    programs number from 1.

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
            first = int(0 not in numbers and total in numbers)
            if missing := total - sum(first <= number < first + total for number in numbers):
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
