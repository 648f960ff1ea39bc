"""Rows of tables that name files: CSV, TSV, JSONL or a JSON list, read from start to end."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError

SURROGATES = "surrogateescape"
"""Bytes that are not UTF-8 are kept as they are, so that one bad row affects no other."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table."""

    values: Mapping[str, Any]
    """Normalised column name to value."""
    where: str
    """Its place for messages: `table.csv:17`."""
    problem: str | None = None
    """Why the row cannot be read."""


def normalise_column(name: str) -> str:
    """Convert a column's name to lower case, with `_` for spaces and hyphens."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def read_rows(path: Path) -> Iterator[TableRow]:
    """Read the rows of a table, in order.

    Raises:
        OneLLMError: the table cannot be read beyond some row.
    """
    if path.suffix.lower() == ".jsonl":
        yield from _read_json_lines(path)
    elif path.suffix.lower() == ".json":
        yield from _read_json_list(path)
    else:
        yield from _read_delimited(path)


def _read_json_lines(path: Path) -> Iterator[TableRow]:
    with path.open(encoding="utf-8-sig", errors=SURROGATES) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield _make_json_row(json.loads(line), where)
                except ValueError as error:
                    yield TableRow({}, where, f"unreadable row: {error}")


def _read_json_list(path: Path) -> Iterator[TableRow]:
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
            f"{path} is not a JSON list.",
            "a sample is one object of the list.",
            "give a list of objects, or a CSV, TSV or JSONL.",
        )
    for number, row in enumerate(rows):
        yield _make_json_row(row, f"{path}[{number}]")


def _make_json_row(row: Any, where: str) -> TableRow:
    if not isinstance(row, dict):
        return TableRow({}, where, f"unreadable row: a {type(row).__name__}, not an object")
    return TableRow({normalise_column(k): v for k, v in row.items()}, where)


def _read_delimited(path: Path) -> Iterator[TableRow]:
    """CSV as in RFC 4180.

    In a tab-separated file a quote is an ordinary character unless it encloses a complete field.
    """
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", errors=SURROGATES, newline="") as file:
        first = file.readline()
        file.seek(0)
        tabs = path.suffix.lower() == ".tsv" or "\t" in first
        delimiter = "\t" if tabs else ";" if ";" in first and "," not in first else ","
        reader = csv.reader(
            file, delimiter=delimiter, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        )
        try:
            header = [
                normalise_column(unquote(name) if tabs else name) for name in next(reader, [])
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
                    dict(zip(header, (unquote(c) if tabs else c for c in cells), strict=True)),
                    where,
                )
        except csv.Error as error:
            raise OneLLMError(
                f"{path}:{reader.line_num}: {error}.",
                "the rows after this place cannot be read.",
                "repair the table.",
            ) from error


def unquote(cell: str) -> str:
    """Remove the quotes that enclose a cell of a tab-separated table."""
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell
