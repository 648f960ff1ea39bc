"""Rows of large CSV and TSV tables, reached by byte offset.

No process reads the rows before its own, and no table is held in memory. A row may span several
lines if a field is quoted. A quote that is not closed within 64 lines makes its own line unreadable
and no other: the lines after it are read as rows again.

This is written by hand because csv.reader, pandas and pyarrow do not tell the byte offset at which
a row begins, and one unclosed quote makes them swallow the rest of the table.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.readers.text_files import check_text

_LONGEST = 64
"""Most lines of one row."""
_BOM = b"\xef\xbb\xbf"
_ERRORS = "surrogateescape"
"""Bytes that are not UTF-8 are kept as they are, so that one bad row affects no other."""


@dataclass(frozen=True)
class Dialect:
    """How the cells of a row are separated."""

    delimiter: str = ","
    quoted: bool = True
    """Whether quotes are those of RFC 4180.

    If false, a row is a line, and a quote is an ordinary character unless it encloses a cell."""


CSV = Dialect()
TSV = Dialect("\t", quoted=False)


csv.field_size_limit(1 << 30)


class RowRange(NamedTuple):
    """Consecutive rows of a table."""

    offset: int
    """Byte offset of the first row."""
    line: int
    """Line number of the first row, from 1."""
    size: int
    """Number of rows."""


TABLE_START = RowRange(0, 1, 0)


class DelimitedRow(NamedTuple):
    """One row of a table."""

    line: int
    """Line number of the row, from 1."""
    values: Mapping[str, str]
    """Column to cell; empty if there is a problem."""
    problem: str | None = None
    """Why the row cannot be read."""


def read_header(
    table: Path, dialect: Dialect, start: RowRange = TABLE_START
) -> tuple[list[str], RowRange]:
    """Read the first row of a table.

    Args:
        table: the file.
        dialect: its format.
        start: where the header is expected.

    Returns:
        The names of the columns, and where the rows begin (a range of size 0).

    Raises:
        UsageError: the table is empty or no UTF-8 text, or its header cannot be read.
    """
    with table.open("rb") as file:
        check_text(table, file.read(64))
        for first in _read_records(file, dialect, start.offset, start.line):
            try:
                if first.problem is not None:
                    raise csv.Error(first.problem)
                names = _split_cells(first.lines, dialect)
            except csv.Error as error:
                raise UsageError(
                    f"{table}:{first.line}: the header cannot be read: {error}.",
                    "it names the columns.",
                    "repair the first row of the table.",
                ) from error
            after = first.offset + sum(map(len, first.lines))
            return [n.strip() for n in names], RowRange(after, first.line + len(first.lines), 0)
    raise UsageError(
        f"{table} is empty.", "it names no samples.", "check the path, or fetch it again."
    )


def split_line(line: str, dialect: Dialect) -> list[str]:
    """Split one line into its cells, as far as its quotes allow."""
    try:
        return _split_cells([line.encode("utf-8", _ERRORS)], dialect)
    except csv.Error:
        return [line]


def find_row_ranges(
    table: Path, dialect: Dialect, rows: int, start: RowRange = TABLE_START
) -> Iterator[RowRange]:
    """Divide a table into ranges of rows; blank lines do not count.

    Args:
        table: the file.
        dialect: its format.
        rows: rows per range.
        start: where the rows begin (`read_header` returns it).
    """
    first, count = start, 0
    with table.open("rb") as file:
        for record in _read_records(file, dialect, start.offset, start.line):
            if count == rows:
                yield RowRange(first.offset, first.line, count)
                first, count = RowRange(record.offset, record.line, 0), 0
            elif not count:
                first = RowRange(record.offset, record.line, 0)
            count += 1
    if count:
        yield RowRange(first.offset, first.line, count)


def read_rows(
    table: Path, dialect: Dialect, where: RowRange, names: Sequence[str]
) -> Iterator[DelimitedRow]:
    """Read the rows of a range; a row with too few or too many cells has a problem and no values.

    Args:
        table: the file.
        dialect: its format.
        where: the range.
        names: the columns, in order.
    """
    with (
        table.open("rb") as file,
        closing(_read_records(file, dialect, where.offset, where.line)) as records,
    ):
        for number, record in enumerate(records):
            if number == where.size:
                return
            if record.problem is not None:
                yield DelimitedRow(record.line, {}, record.problem)
                continue
            try:
                cells = _split_cells(record.lines, dialect)
            except csv.Error as error:
                yield DelimitedRow(record.line, {}, f"unreadable row: {error}")
                continue
            if len(cells) != len(names):
                yield DelimitedRow(
                    record.line,
                    {},
                    f"unreadable row: {len(cells)} columns where the header has {len(names)}",
                )
            else:
                yield DelimitedRow(record.line, dict(zip(names, cells, strict=True)))


class _Record(NamedTuple):
    """The lines of one row before they are split into cells."""

    offset: int
    line: int
    lines: list[bytes]
    problem: str | None = None


class _UnclosedQuoteError(Exception):
    """A quoted field has more than `_LONGEST` lines."""


def _read_records(
    file: IO[bytes], dialect: Dialect, offset: int, line: int
) -> Generator[_Record, None, None]:
    file.seek(offset)
    waiting: deque[bytes] = deque()
    while text := (waiting.popleft() if waiting else file.readline()):
        begin, number, lines, problem = offset, line, [text], None
        if offset == 0 and text.startswith(_BOM):
            lines = [text[len(_BOM) :]]
            begin = len(_BOM)
        if dialect.quoted and b'"' in text:
            lines, problem = _read_quoted(lines[0], file, waiting, dialect)
        offset = begin + sum(map(len, lines))
        line += len(lines)
        if lines[0].strip(b"\r\n"):
            yield _Record(begin, number, lines, problem)


def _read_quoted(
    first: bytes, file: IO[bytes], waiting: deque[bytes], dialect: Dialect
) -> tuple[list[bytes], str | None]:
    """The lines of the row that begins with `first`, and what is wrong with the row."""
    taken = [first]

    def feed() -> Iterator[str]:
        yield first.decode("utf-8", _ERRORS)
        while True:
            more = waiting.popleft() if waiting else file.readline()
            if more:
                taken.append(more)
            if not more or len(taken) > _LONGEST:
                raise _UnclosedQuoteError
            yield more.decode("utf-8", _ERRORS)

    try:
        next(csv.reader(feed(), delimiter=dialect.delimiter))
    except _UnclosedQuoteError:
        waiting.extendleft(reversed(taken[1:]))
        return [first], "unreadable row: a quote is opened and not closed"
    except csv.Error as error:
        return taken, f"unreadable row: {error}"
    return taken, None


def _split_cells(lines: Sequence[bytes], dialect: Dialect) -> list[str]:
    texts = [part.decode("utf-8", _ERRORS) for part in lines]
    if dialect.quoted:
        return next(csv.reader(iter(texts), delimiter=dialect.delimiter), [])
    return [_unquote(cell) for cell in texts[0].rstrip("\r\n").split(dialect.delimiter)]


def _unquote(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell
