"""Rows of tables that name files: CSV, TSV, JSON lines or a JSON list, read from start to end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.readers import delimited
from onellm_dist.shards.sources.readers.table_columns import count_known_columns
from onellm_dist.shards.sources.readers.text_files import (
    JSON_SUFFIXES,
    check_text,
    has_json_lines,
)

TABLE_SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES)
"""Suffixes of tables, in lower case."""
SURROGATES = "surrogateescape"
"""Bytes that are not UTF-8 are kept as they are, so that one bad row affects no other."""
_ALL_ROWS = 1 << 62


@dataclass(frozen=True)
class TableRow:
    """One row of a table."""

    values: Mapping[str, Any]
    """Normalised column name to value."""
    where: str
    """Position of the row for messages: `table.csv:17`."""
    problem: str | None = None
    """Why the row cannot be read."""


def normalise_column(name: str) -> str:
    """Convert a column's name to lower case, with `_` for spaces and hyphens."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def read_rows(path: Path) -> Iterator[TableRow]:
    """Read the rows of a table, in order.

    Raises:
        UsageError: it is not a table of UTF-8 text, or two columns have the same name.
        OneLLMError: the table cannot be read beyond some row.
    """
    if path.suffix.lower() not in JSON_SUFFIXES:
        yield from _read_delimited(path)
    elif has_json_lines(path):
        yield from _read_json_lines(path)
    else:
        yield from _read_json_list(path)


def _read_json_lines(path: Path) -> Iterator[TableRow]:
    with path.open(encoding="utf-8-sig", errors=SURROGATES) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield _make_json_row(_parse_json(line), where)
                except (ValueError, RecursionError) as error:
                    yield TableRow({}, where, f"unreadable row: {error}")


def _read_json_list(path: Path) -> Iterator[TableRow]:
    try:
        rows = _parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        raise UsageError(
            f"{path}: {error}",
            "the file holds several JSON values, one after another."
            if extra
            else "the table cannot be read.",
            "give a JSON list of objects, or one object a line, or a CSV or TSV.",
        ) from error
    if not isinstance(rows, list):
        keys = f", but an object of {', '.join(list(rows)[:8])}" if isinstance(rows, dict) else ""
        raise UsageError(
            f"{path} is not a JSON list{keys}.",
            "a sample is one object of the list.",
            "give a list of objects, or a CSV, TSV or JSONL.",
        )
    for number, row in enumerate(rows):
        yield _make_json_row(row, f"{path}[{number}]")


def _parse_json(text: str | bytes) -> Any:
    """Parse JSON; NaN and infinities, which are not JSON, become None."""
    return json.loads(text, parse_constant=lambda _: None)


def _make_json_row(row: Any, where: str) -> TableRow:
    if not isinstance(row, dict):
        return TableRow({}, where, f"unreadable row: a {type(row).__name__}, not an object")
    return TableRow({normalise_column(k): v for k, v in row.items()}, where)


def _read_delimited(path: Path) -> Iterator[TableRow]:
    """CSV as in RFC 4180.

    In a tab-separated file a quote is an ordinary character unless it encloses a complete field.
    """
    if not path.stat().st_size:
        return
    dialect, start = find_dialect(path)
    header, after = delimited.read_header(path, dialect, start)
    names = [normalise_column(name) for name in header]
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise UsageError(
            f"{path}: several columns are called {twice[0]!r}.",
            "it is unclear which of them is meant.",
            "rename or remove the others.",
        )
    rows = delimited.read_rows(path, dialect, after._replace(size=_ALL_ROWS), names)
    for row in rows:
        yield TableRow(row.values, f"{path}:{row.line}", row.problem)


def find_dialect(path: Path) -> tuple[delimited.Dialect, delimited.RowRange]:
    """Find out what separates the cells of a table, and where its header begins.

    A first line `sep=;`, as Excel writes it, says so. Otherwise it is a tab in a `.tsv`, or the
    character that gives the header the most columns with a known name, then the most columns.

    Raises:
        UsageError: the file is not UTF-8 text.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
    check_text(path, head[:64])
    first, newline, _ = head.partition(b"\n")
    line = first.removeprefix(b"\xef\xbb\xbf").decode("utf-8", SURROGATES).strip("\r")
    if line.lower().startswith("sep=") and len(line) == 5:
        return _make_dialect(line[4]), delimited.RowRange(len(first) + len(newline), 2, 0)
    start = delimited.TABLE_START
    if path.suffix.lower() == ".tsv":
        return delimited.TSV, start

    def rate(delimiter: str) -> tuple[int, int]:
        cells = delimited.split_line(line, _make_dialect(delimiter))
        return count_known_columns(map(normalise_column, cells)), len(cells)

    return _make_dialect(max((",", "\t", ";", "|"), key=rate)), start


def _make_dialect(delimiter: str) -> delimited.Dialect:
    return delimited.TSV if delimiter == "\t" else delimited.Dialect(delimiter)
