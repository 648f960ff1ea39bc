"""Folder layout B: a table (CSV, TSV, JSONL, or a JSON list) names the files and their captions, a sample a row."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
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
"""Any kind of file, most telling first; a column named after a slot (`audio`, `depth_image`) says which part it is."""
KEY_COLUMNS = ("key", "id")
SLOT_ENDINGS = ("", "_file", "_path", "_image", "_file_name", "_filename")
_SURROGATES = "surrogateescape"  # bytes that are not UTF-8 survive as such, so that one bad row spoils no other


@dataclass(frozen=True)
class TableRow:
    """One row: normalised column name to value, and where it stands."""

    values: Mapping[str, Any]
    where: str
    problem: str | None = None


@dataclass(frozen=True)
class TableColumns:
    """Which column is what."""

    caption: str | None
    generic: str | None
    slots: Mapping[str, tuple[tuple[str, ...], ...]]
    """Column -> the accepted extensions of each slot that it may name."""
    key: str | None

    @property
    def files(self) -> set[str]:
        """All columns that name files."""
        return {*self.slots, *([self.generic] if self.generic else [])}


def normalise_column(name: str) -> str:
    """A column's name in lower case, with `_` for spaces and hyphens."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def read_rows(path: Path) -> Iterator[TableRow]:
    """The rows of a table, in order.

    Raises:
        OneLLMError: the table as a whole cannot be read.
    """
    if path.suffix.lower() == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix.lower() == ".json":
        yield from _json_list(path)
    else:
        yield from _delimited(path)


def _json_lines(path: Path) -> Iterator[TableRow]:
    with path.open(encoding="utf-8-sig", errors=_SURROGATES) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield _json_row(json.loads(line), where)
                except ValueError as error:
                    yield TableRow({}, where, f"unreadable row: {error}")


def _json_list(path: Path) -> Iterator[TableRow]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(
            f"{path}: {error}",
            "the table cannot be read.",
            "give a JSON list of objects, or a CSV, TSV or JSONL.",
        ) from error
    if not isinstance(rows, list):
        raise UsageError(
            f"{path} is no JSON list.",
            "a sample is one object of the list.",
            "give a list of objects, or a CSV, TSV or JSONL.",
        )
    for number, row in enumerate(rows):
        yield _json_row(row, f"{path}[{number}]")


def _json_row(row: Any, where: str) -> TableRow:
    if not isinstance(row, dict):
        return TableRow({}, where, f"unreadable row: a {type(row).__name__}, not an object")
    return TableRow({normalise_column(k): v for k, v in row.items()}, where)


def _delimited(path: Path) -> Iterator[TableRow]:
    """CSV by RFC 4180; in a tab-separated file a quote is an ordinary character unless it encloses a whole field."""
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", errors=_SURROGATES, newline="") as file:
        first = file.readline()
        file.seek(0)
        tabs = path.suffix.lower() == ".tsv" or "\t" in first
        delimiter = "\t" if tabs else ";" if ";" in first and "," not in first else ","
        reader = csv.reader(
            file, delimiter=delimiter, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        )
        try:
            header = [
                normalise_column(_unquoted(name) if tabs else name) for name in next(reader, [])
            ]
            for cells in reader:
                if not cells:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    yield TableRow(
                        {},
                        where,
                        f"unreadable row: {len(cells)} columns where the header has {len(header)}",
                    )
                    continue
                yield TableRow(
                    dict(zip(header, (_unquoted(c) if tabs else c for c in cells), strict=True)),
                    where,
                )
        except csv.Error as error:
            raise OneLLMError(
                f"{path}:{reader.line_num}: {error}.",
                "the rows behind this place cannot be told apart.",
                "repair the table.",
            ) from error


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def find_columns(names: set[str], caption: str | None, file: str | None) -> TableColumns:
    """What the columns of these (normalised) names are; `caption` and `file` are the user's own choice."""
    slots: dict[str, tuple[tuple[str, ...], ...]] = {}
    for modality in all_modalities().values():
        for slot, accepted in get_modality_parts(modality).items():
            endings = (
                SLOT_ENDINGS if slot in modality.required_parts else SLOT_ENDINGS[1:]
            )  # `timestamps` alone may hold values
            for column in (slot + ending for ending in endings):
                if column in names and column != file and accepted not in slots.get(column, ()):
                    slots[column] = (*slots.get(column, ()), accepted)
    return TableColumns(
        caption if caption is not None else next((c for c in CAPTION_COLUMNS if c in names), None),
        file
        if file is not None
        else next((c for c in FILE_COLUMNS if c in names and c not in slots), None),
        slots,
        next((c for c in KEY_COLUMNS if c in names), None),
    )


def find_table(root: Path) -> Path | None:
    """The one table at the top of a folder: a CSV, TSV or JSONL whose columns name a file and a caption; None: there is none.

    Raises:
        UsageError: there are several.
    """
    tables = [
        p
        for p in sorted(root.iterdir())
        if p.suffix.lower() in TABLE_SUFFIXES and p.is_file() and _is_table(p)
    ]
    if len(tables) > 1:
        raise UsageError(
            f"{root} has {len(tables)} tables: {', '.join(p.name for p in tables)}.",
            "each names samples, and they may be the same ones.",
            "say which: -o captions=FILE.",
        )
    return tables[0] if tables else None


def _is_table(path: Path) -> bool:
    if path.with_suffix(".txt").exists():
        return False  # media of layout A that is itself a CSV
    with path.open("rb") as file:
        head = file.read(1 << 16).decode("utf-8-sig", _SURROGATES).splitlines()
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
            normalise_column(_unquoted(c))
            for c in head[0].replace("\t", ",").replace(";", ",").split(",")
        }
    columns = find_columns(names, None, None)
    return bool(columns.files) and (columns.caption is not None or "conversations" in names)


def _file_parts(
    row: TableRow, columns: TableColumns, folders: tuple[Path, ...]
) -> tuple[dict[str, Path], str | None]:
    """Part extension to file, and what is wrong."""
    found: dict[str, Path] = {}
    for column in (*columns.slots, columns.generic):
        value = row.values.get(column) if column is not None else None
        if value in (None, ""):
            continue
        if not isinstance(value, str):
            return found, f"unreadable row: {column} is a {type(value).__name__}, not a file name"
        name = value.strip().removeprefix("file://")
        if "://" in name:
            if found:
                continue  # the row's local file was found; this only says where it came from
            return (
                found,
                f"remote file: {name} is a URL; download it first (img2dataset, video2dataset, yt-dlp)",
            )
        path = next((p for f in folders if (p := f / name).is_file()), None)
        if path is None:
            return found, f"missing file: {name}"
        extension = _extension(path, columns.slots.get(column or "", ()))
        if extension is None:
            return found, f"unknown kind of file: {name}"
        found.setdefault(extension, path)
    return found, None if found else "missing file: the row names none"


def _extension(path: Path, slots: tuple[tuple[str, ...], ...]) -> str | None:
    """The part's extension: of a slot's column, the most specific one that fits the file (`0.png` as a depth map: `depth.png`)."""
    split = split_file_name(path.name)
    plain = split[1] if split else path.suffix.lower().lstrip(".")
    for accepted in slots:
        fitting = next((e for e in accepted if e == plain or e.endswith("." + plain)), None)
        if fitting is not None:
            return fitting
    return split[1] if split else None


def _siblings(found: dict[str, Path], modalities: tuple[str, ...]) -> None:
    """Fills required slots that no column names from files beside the row's file: `0.jpg` -> `0.depth.png`."""
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
    """Layout B, in the order of the table. Arguments and result as `side_file_raw_samples`."""
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
        ({}, row.problem) if row.problem or wanted == () else _file_parts(row, columns, folders)
        for row in rows
    ]
    if wanted is None:
        wanted = infer_modalities(Counter(frozenset(found) for found, _ in parts if found), table)
    seen: Counter[str] = Counter()
    raw_samples = [
        _row_raw_sample(row, *part, columns, wanted, root, seen, i)
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
            f"name it one of {', '.join(FILE_COLUMNS)}, or after a modality; or give -o file_column=NAME.",
        )
    if columns.caption not in names and "conversations" not in names:
        raise UsageError(
            f"{table}: no column holds captions (columns: {shown}).",
            "a sample without text teaches nothing.",
            f"name it one of {', '.join(CAPTION_COLUMNS)}, or `conversations`; or give -o caption_column=NAME.",
        )


def _row_raw_sample(
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
        _siblings(found, modalities)
        media, problem = select_parts(found, modalities)
    used = {*columns.files, columns.caption, columns.key}
    meta = {k: v for k, v in row.values.items() if k not in used and v not in (None, "")}
    text = row.values.get(columns.caption) if columns.caption else None
    if problem is None and text is not None and not isinstance(text, str):
        problem = f"caption is no text: a {type(text).__name__}"
    caption = (
        text if isinstance(text, str) and (text.strip() or not meta.get("conversations")) else None
    )
    key = _key(row, columns, found, root, number)
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


def _key(
    row: TableRow, columns: TableColumns, found: Mapping[str, Path], root: Path, number: int
) -> str:
    """The row's own key; else its first file's path without extension; else its number."""
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
