"""Folders with a table (CSV, TSV, JSONL or a JSON list) that names files and captions.

A row is a sample.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.shards.format.names import (
    get_modality_parts,
    infer_modalities,
    make_safe_key,
    split_file_name,
)
from onellm_dist.shards.sources.base import RawSample
from onellm_dist.shards.sources.readers.folder_files import select_parts
from onellm_dist.shards.sources.readers.table_rows import (
    SURROGATES,
    TableRow,
    normalise_column,
    read_rows,
    unquote,
)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
CAPTION_COLUMNS = ("caption", "text", "description", "sentence", "title", "label")
FILE_COLUMNS = (
    "file",
    "file_name",
    "filename",
    "file_path",
    "filepath",
    "path",
    "image",
    "img",
    "media",
    "image_path",
    "url",
)
"""Columns of files of any modality, the most specific first.

A column that is named after a role (`audio`, `depth_image`) says which part it holds."""
KEY_COLUMNS = ("key", "id")
ROLE_ENDINGS = ("", "_file", "_path", "_image", "_file_name", "_filename")


@dataclass(frozen=True)
class TableColumns:
    """What the columns of a table hold."""

    caption: str | None
    """The column of captions."""
    generic: str | None
    """The column of files whose role their extension says."""
    roles: Mapping[str, tuple[tuple[str, ...], ...]]
    """Column of files to the accepted extensions of each role that it may hold."""
    key: str | None
    """The column of keys."""

    @property
    def files(self) -> set[str]:
        """All columns of files."""
        return {*self.roles, *([self.generic] if self.generic else [])}


def find_columns(names: set[str], caption: str | None, file: str | None) -> TableColumns:
    """Find out what the columns of a table hold.

    Args:
        names: normalised names of all columns.
        caption: the user's column of captions.
        file: the user's column of files.
    """
    roles: dict[str, tuple[tuple[str, ...], ...]] = {}
    for modality in all_modalities().values():
        for role, accepted in get_modality_parts(modality).items():
            # A column that is called `timestamps` alone may hold values.
            endings = ROLE_ENDINGS if role in modality.required_parts else ROLE_ENDINGS[1:]
            for column in (role + ending for ending in endings):
                if column in names and column != file and accepted not in roles.get(column, ()):
                    roles[column] = (*roles.get(column, ()), accepted)
    return TableColumns(
        caption if caption is not None else next((c for c in CAPTION_COLUMNS if c in names), None),
        file
        if file is not None
        else next((c for c in FILE_COLUMNS if c in names and c not in roles), None),
        roles,
        next((c for c in KEY_COLUMNS if c in names), None),
    )


def find_table(root: Path) -> Path | None:
    """Find the table at the top of a folder: a CSV, TSV or JSONL that names files and captions.

    Returns:
        The table; None if there is none.

    Raises:
        UsageError: there are several.
    """
    tables = [
        p
        for p in sorted(root.iterdir())
        if p.suffix.lower() in TABLE_SUFFIXES and p.is_file() and _is_sample_table(p)
    ]
    if len(tables) > 1:
        raise UsageError(
            f"{root} has {len(tables)} tables: {', '.join(p.name for p in tables)}.",
            "they may name the same samples.",
            "choose one: -o captions=FILE.",
        )
    return tables[0] if tables else None


def _is_sample_table(path: Path) -> bool:
    if path.with_suffix(".txt").exists():
        return False  # media with a side file that is itself a CSV
    with path.open("rb") as file:
        head = file.read(1 << 16).decode("utf-8-sig", SURROGATES).splitlines()
    if not head:
        return False
    if path.suffix.lower() == ".jsonl":
        try:
            first = json.loads(head[0])
        except ValueError:
            return False
        names = set(map(normalise_column, first)) if isinstance(first, dict) else set[str]()
    else:
        names = {
            normalise_column(unquote(c))
            for c in head[0].replace("\t", ",").replace(";", ",").split(",")
        }
    columns = find_columns(names, None, None)
    return bool(columns.files) and (columns.caption is not None or "conversations" in names)


def _find_parts(
    row: TableRow, columns: TableColumns, folders: tuple[Path, ...]
) -> tuple[dict[str, Path], str | None]:
    """Extension to file, and what is wrong."""
    found: dict[str, Path] = {}
    for column in (*columns.roles, columns.generic):
        value = row.values.get(column) if column is not None else None
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
        path = next((p for f in folders if (p := f / name).is_file()), None)
        if path is None:
            return found, f"missing file: {name}"
        extension = _choose_extension(path, columns.roles.get(column or "", ()))
        if extension is None:
            return found, f"unknown kind of file: {name}"
        found.setdefault(extension, path)
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
) -> tuple[tuple[str, ...], list[RawSample], list[str]]:
    """Read the samples that a table names.

    Args:
        table: the file.
        root: the input folder, in which files are searched too.
        wanted: the modalities; None to infer them.
        caption_column: the user's column of captions.
        file_column: the user's column of files.

    Returns:
        Modalities, raw samples in the order of the table, and no notes.
    """
    rows = list(read_rows(table))
    names = {name for row in rows for name in row.values}
    columns = find_columns(
        names,
        normalise_column(caption_column) if caption_column else None,
        normalise_column(file_column) if file_column else None,
    )
    _require_columns(table, names, columns, wanted)
    folders = (table.parent, root)
    parts = [
        ({}, row.problem) if row.problem or wanted == () else _find_parts(row, columns, folders)
        for row in rows
    ]
    if wanted is None:
        wanted = infer_modalities(Counter(frozenset(found) for found, _ in parts if found), table)
    seen: Counter[str] = Counter()
    raw_samples = [
        _make_raw_sample(row, *part, columns, wanted, root, seen, i)
        for i, (row, part) in enumerate(zip(rows, parts, strict=True))
    ]
    return wanted, raw_samples, []


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
    if columns.caption not in names and "conversations" not in names:
        raise UsageError(
            f"{table}: no column holds captions (columns: {shown}).",
            "a sample without text teaches nothing.",
            f"name it one of {', '.join(CAPTION_COLUMNS)}, or `conversations`; "
            f"or use -o caption_column=NAME.",
        )


def _make_raw_sample(
    row: TableRow,
    found: dict[str, Path],
    problem: str | None,
    columns: TableColumns,
    modalities: tuple[str, ...],
    root: Path,
    seen: Counter[str],
    number: int,
) -> RawSample:
    media: dict[str, Path] = {}
    if problem is None and modalities:
        _add_siblings(found, modalities)
        media, problem = select_parts(found, modalities)
    used = {*columns.files, columns.caption, columns.key}
    meta = {k: v for k, v in row.values.items() if k not in used and v not in (None, "")}
    text = row.values.get(columns.caption) if columns.caption else None
    if problem is None and text is not None and not isinstance(text, str):
        problem = f"caption is not text: a {type(text).__name__}"
    caption = (
        text if isinstance(text, str) and (text.strip() or not meta.get("conversations")) else None
    )
    key = _make_key(row, columns, found, root, number)
    seen[key] += 1
    if seen[key] > 1:
        key = f"{key}-{seen[key]}"
    return RawSample(
        key,
        row.where,
        {e: p for e, p in media.items() if e not in TEXT_EXTENSIONS},
        caption,
        meta,
        problem,
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
