"""Folders with a table (CSV, TSV, JSON lines or a JSON list) that names files and captions.

A row is a sample.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.hidden_files import is_hidden
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.common.turns import CONVERSATION_KEYS
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.shards.format.names import (
    get_modality_parts,
    infer_modalities,
    make_safe_key,
    split_file_name,
)
from onellm_dist.shards.sources.base import RawSample
from onellm_dist.shards.sources.readers.delimited import read_header
from onellm_dist.shards.sources.readers.json_stream import scan_rows
from onellm_dist.shards.sources.readers.listing import get_shown_suffix
from onellm_dist.shards.sources.readers.named_files import (
    describe_missing_file,
    find_named_file,
)
from onellm_dist.shards.sources.readers.part_selection import select_parts
from onellm_dist.shards.sources.readers.table_columns import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    NO_VALUE,
    TableColumns,
    find_columns,
)
from onellm_dist.shards.sources.readers.table_rows import (
    TABLE_SUFFIXES,
    TableRow,
    find_dialect,
    normalise_column,
    read_rows,
)
from onellm_dist.shards.sources.readers.table_texts import read_row_texts
from onellm_dist.shards.sources.readers.text_files import JSON_SUFFIXES
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique
from onellm_dist.shards.sources.readers.unread_media import find_unread_column, is_empty

_SHOWN = 3
"""Missing files that an error names."""


def find_table(
    root: Path, caption: str | None = None, file: str | None = None, *, lists: bool = False
) -> Path | None:
    """Find the table at the top of a folder that names files and captions.

    A `.json` is one if it is a list or has a JSON object a line, and no medium has its name.

    Args:
        root: the folder.
        caption: the user's column of captions.
        file: the user's column of files.
        lists: whether columns like `images` name files, too.

    Returns:
        The table; None if there is none.

    Raises:
        UsageError: there are several.
    """
    names = sorted(name for name in os.listdir(root) if not is_hidden(name))
    stems = Counter(split[0] for name in names if (split := split_file_name(name)) is not None)
    tables = [
        path
        for name in names
        if (path := root / name).suffix.lower() in TABLE_SUFFIXES
        and not (path.suffix.lower() == ".json" and stems[path.stem] > 1)
        and path.is_file()
        and is_sample_table(path, caption, file, lists=lists)
    ]
    if len(tables) > 1:
        raise UsageError(
            f"{root} has {len(tables)} tables: {', '.join(p.name for p in tables)}.",
            "they may name the same samples.",
            "choose one: -o captions=FILE.",
        )
    return tables[0] if tables else None


def is_sample_table(
    path: Path, caption: str | None = None, file: str | None = None, *, lists: bool = False
) -> bool:
    """Check by its columns whether a file is a table of files and captions.

    Args:
        path: the file.
        caption: the user's column of captions.
        file: the user's column of files.
        lists: as of `find_table`.
    """
    if path.with_suffix(".txt").exists():
        return False  # media with a side file that is itself a CSV
    try:
        names = read_column_names(path)
    except OneLLMError:
        return False
    own = {normalise_column(name) for name in (caption, file) if name is not None}
    columns = find_columns(names, None, None)
    has_file = bool(columns.files) or (file is not None and normalise_column(file) in names)
    has_file = has_file or (lists and any(f"{name}s" in names for name in all_modalities()))
    has_text = columns.caption is not None or bool({*CONVERSATION_KEYS, *own} & names)
    return has_file and (has_text or path.stem.lower() == "metadata")


def read_column_names(path: Path) -> set[str]:
    """Read the normalised names of a table's columns, from its header or its first object.

    Raises:
        OneLLMError: there are none, or the file cannot be read.
    """
    if path.suffix.lower() in JSON_SUFFIXES:
        first = next(scan_rows(path), None)
        if first is None or first.key or not isinstance(first.value, dict):
            return set()
        return set(map(normalise_column, first.value))
    dialect, start = find_dialect(path)
    return set(map(normalise_column, read_header(path, dialect, start)[0]))


def _find_parts(
    row: TableRow, columns: TableColumns, folders: Sequence[Path]
) -> tuple[dict[str, Path], str | None]:
    """Extension to file, and what is wrong."""
    found: dict[str, Path] = {}
    for column in (*columns.roles, columns.generic):
        value = row.values.get(column) if column is not None else None
        if isinstance(value, list):
            value = [item for item in value if not is_empty(item)]
            if len(value) > 1:
                return found, (
                    f"several media: {column} lists {len(value)} files; a sample has one of a "
                    "kind (several=list reads them all)"
                )
            value = value[0] if value else None
        if value in (None, ""):
            continue
        if not isinstance(value, str):
            return found, f"unreadable row: {column} is a {type(value).__name__}, not a file name"
        name = value.strip().removeprefix("file://")
        if "://" in name:
            if found:
                continue  # the row's local file was found; this says where it came from
            return found, (
                f"remote file: {name} is a URL; "
                f"download it first (img2dataset, video2dataset, yt-dlp)"
            )
        path = find_named_file(folders, name)
        if path is None:
            return found, describe_missing_file(folders, name)
        extension = _choose_extension(path, columns.roles.get(column or "", ()))
        if extension is None:
            return found, f"unknown kind of file: {name}"
        found.setdefault(extension, path)
    known = all_modalities()
    unread = find_unread_column(row.values, columns.files, known, has_media=bool(found))
    if unread is not None:
        return found, f"unread media: the column {unread} names a file, and is not read"
    return found, None if found else "missing file: the row names none"


def _choose_extension(path: Path, roles: tuple[tuple[str, ...], ...]) -> str | None:
    """The extension of a file as a part.

    In a column of a role it is the most specific that fits (`0.png` as a depth map: `depth.png`).
    """
    split = split_file_name(path.name)
    plain = split[1] if split else path.suffix.lower().lstrip(".")
    for accepted in roles:
        fitting = next((e for e in accepted if e == plain or e.endswith("." + plain)), None)
        if fitting is not None:
            return fitting
    return split[1] if split else None


def _add_siblings(found: dict[str, Path], modalities: tuple[str, ...]) -> None:
    """Add files beside the row's file for roles without a column: `0.depth.png` for `0.jpg`."""
    anchor = next(iter(found.values()))
    split = split_file_name(anchor.name)
    for name in modalities:
        for accepted in get_modality_parts(get_modality(name)).values():
            if split is None or any(e in found for e in accepted):
                continue
            beside = next(
                (e for e in accepted if (anchor.with_name(f"{split[0]}.{e}")).is_file()), None
            )
            if beside is not None:
                found[beside] = anchor.with_name(f"{split[0]}.{beside}")


def read_table_samples(
    table: Path,
    root: Path,
    wanted: tuple[str, ...] | None,
    caption_column: str | None,
    file_column: str | None,
    media: Path | None = None,
) -> tuple[tuple[str, ...], list[RawSample], list[str]]:
    """Read the samples that a table names.

    Args:
        table: the file.
        root: the input folder, in which files are searched too.
        wanted: the modalities; None to infer them.
        caption_column: the user's column of captions.
        file_column: the user's column of files.
        media: the folder at which paths begin; None: the table's own, then `root`.

    Returns:
        Modalities, raw samples in the order of the table, and notes.

    Raises:
        UsageError: the table lacks columns, its captions are numbers that nobody asked for, or none
            of its files is there.
    """
    rows = list(read_rows(table))
    names = {name for row in rows for name in row.values}
    columns = find_columns(
        names,
        normalise_column(caption_column) if caption_column else None,
        normalise_column(file_column) if file_column else None,
    )
    _require_columns(table, names, columns, wanted)
    if caption_column is None:
        _require_words(table, rows, columns.caption)
    folders = (media,) if media is not None else tuple(dict.fromkeys((table.parent, root)))
    parts = [
        ({}, row.problem) if row.problem or wanted == () else _find_parts(row, columns, folders)
        for row in rows
    ]
    if wanted is None:
        _require_files(table, [problem for _, problem in parts], [found for found, _ in parts])
        wanted = infer_modalities(Counter(frozenset(found) for found, _ in parts if found), table)
    keys = make_keys_unique(
        _make_key(row, columns, found, root, i)
        for i, (row, (found, _)) in enumerate(zip(rows, parts, strict=True))
    )
    raw_samples = [
        _make_raw_sample(key, row, *part, columns, wanted)
        for key, row, part in zip(keys, rows, parts, strict=True)
    ]
    return wanted, raw_samples, []


def count_unused(root: Path, used: set[str], most: int = 200_000) -> tuple[Counter[str], int]:
    """Count the files below a folder that no sample uses.

    Args:
        root: the folder.
        used: normal paths (`os.path.normpath`) of the files that are used, the table among them.
        most: files after which counting stops.

    Returns:
        Suffix to number of files, and the number of hidden files and folders.
    """
    unused, hidden = Counter[str](), 0
    for name, path in _walk(root):
        if is_hidden(name):
            hidden += 1
        elif path not in used:
            unused[get_shown_suffix(name)] += 1
        if unused.total() + hidden >= most:
            break
    return unused, hidden


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """Yield name and path of files, and of hidden folders, which are not entered."""
    for folder, folders, names in os.walk(root):
        for name in sorted((*names, *filter(is_hidden, folders))):
            yield name, os.path.normpath(os.path.join(folder, name))
        folders[:] = sorted(f for f in folders if not is_hidden(f))


def _require_files(
    table: Path, problems: Sequence[str | None], found: Sequence[Mapping[str, Path]]
) -> None:
    """Refuse a table none of whose files is there.

    Raises:
        UsageError: no row has a file; the message has the first reasons.
    """
    if any(found) or not problems:
        return
    reasons = list(dict.fromkeys(p for p in problems if p is not None))
    more = f", and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    raise UsageError(
        f"{table}: none of the files of its {format_count(len(problems), 'row')} was found: "
        f"{'; '.join(reasons[:_SHOWN])}{more}.",
        "there is nothing to build from.",
        "correct the paths, or name the folder in which they begin: -o media=FOLDER.",
    )


def _require_columns(
    table: Path, names: set[str], columns: TableColumns, wanted: tuple[str, ...] | None
) -> None:
    shown = ", ".join(sorted(names)) or "none"
    if wanted != () and (not columns.files or not columns.files & names):
        raise UsageError(
            f"{table}: no column names a file (columns: {shown}).",
            "media cannot be found.",
            f"name it one of {', '.join(FILE_COLUMNS)}, or after a modality; "
            f"or use -o file_column=NAME.",
        )
    if columns.caption not in names and not names & set(CONVERSATION_KEYS):
        raise UsageError(
            f"{table}: no column holds captions (columns: {shown}).",
            "a sample without text teaches nothing.",
            f"name it one of {', '.join(CAPTION_COLUMNS)}, or `conversations` or `messages`; "
            f"or use -o caption_column=NAME.",
        )


def _require_words(table: Path, rows: Sequence[TableRow], column: str | None) -> None:
    """Refuse a column of captions that nobody named and that holds numbers alone.

    Raises:
        UsageError: all its cells are numbers, such as those of classes.
    """
    cells = [row.values.get(column) for row in rows] if column is not None else []
    texts = [c.strip() for c in cells if isinstance(c, str) and c.strip() not in ("", *NO_VALUE)]
    if texts and all(map(_is_number, texts)):
        shown = ", ".join(list(dict.fromkeys(texts))[:_SHOWN])
        raise UsageError(
            f"{table}: its captions, in column {column!r}, are numbers alone ({shown}).",
            "numbers of classes are not captions: the model would learn to say them.",
            "write what they mean into a column `caption`, or use -o caption_column="
            f"{column} if they are meant.",
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _make_raw_sample(
    key: str,
    row: TableRow,
    found: dict[str, Path],
    problem: str | None,
    columns: TableColumns,
    modalities: tuple[str, ...],
) -> RawSample:
    media: dict[str, Path] = {}
    if problem is None and modalities:
        _add_siblings(found, modalities)
        media, problem = select_parts(found, modalities)
    texts = read_row_texts(row, columns)
    medium = None
    if not modalities:
        medium = find_unread_column(row.values, (columns.caption or "",), (), has_media=False)
    if medium is not None:
        return RawSample(
            key, row.where, skip=f"has a medium (the column {medium}): not a row of text alone"
        )
    return RawSample(
        key,
        row.where,
        {e: p for e, p in media.items() if e not in TEXT_EXTENSIONS},
        texts.caption,
        texts.meta,
        texts.problem if problem is None else problem,
    )


def _make_key(
    row: TableRow, columns: TableColumns, found: Mapping[str, Path], root: Path, number: int
) -> str:
    """The row's own key, else the path of its first file without extension, else its number."""
    own = row.values.get(columns.key) if columns.key else None
    if isinstance(own, (str, int)) and str(own).strip():
        return make_safe_key(str(own).strip())
    if not found:
        return f"row-{number:09d}"
    path = next(iter(found.values()))
    relative = Path(os.path.relpath(path, root))
    if ".." in relative.parts:
        relative = Path(path.name)
    split = split_file_name(relative.name)
    return make_safe_key(relative.with_name(split[0] if split else relative.stem).as_posix())
