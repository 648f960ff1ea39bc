"""Rows of large CSV and TSV tables, reached by byte offset: no process reads the rows before its own, and no table is held in memory.

A row may run over several lines where a field is quoted. A quote that is not closed within 64 lines spoils its own line alone: what
follows is read as rows again.
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

_LONGEST = 64
"""Lines of one row."""
_BOM = b"\xef\xbb\xbf"
_ERRORS = "surrogateescape"  # bytes that are not UTF-8 survive as such, so that one bad row spoils no other


@dataclass(frozen=True)
class Dialect:
    """How cells are told apart."""

    delimiter: str = ","
    quoted: bool = True
    """Quotes as in RFC 4180. False: a quote is an ordinary character unless it encloses a whole cell, and a row is a line."""


CSV, TSV = Dialect(), Dialect("\t", quoted=False)


class RowRange(NamedTuple):
    """Consecutive rows of a table."""

    offset: int
    """Byte at which the first one begins."""
    line: int
    """Its line, from 1."""
    size: int
    """Rows."""


class DelimitedRow(NamedTuple):
    """One row."""

    line: int
    values: Mapping[str, str]
    problem: str | None = None


def read_header(table: Path, dialect: Dialect) -> tuple[list[str], RowRange]:
    """(names of the columns, where the rows begin; its size is 0).

    Raises:
        UsageError: the table is empty.
    """
    with table.open("rb") as file:
        for first in _records(file, dialect, 0, 1):
            names = _cells(first.lines, dialect)
            after = first.offset + sum(map(len, first.lines))
            return [n.strip() for n in names], RowRange(after, first.line + len(first.lines), 0)
    raise UsageError(
        f"{table} is empty.", "it names no samples.", "check the path, or fetch it again."
    )


def find_row_ranges(
    table: Path, dialect: Dialect, rows: int, start: RowRange = RowRange(0, 1, 0)
) -> Iterator[RowRange]:
    """The table from `start` on in ranges of `rows` rows, blank lines not counted."""
    first, count = start, 0
    with table.open("rb") as file:
        for record in _records(file, dialect, start.offset, start.line):
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
    """The rows of a range; one with too few or too many cells has a problem and no values.

    Args:
        names: of the columns, in order.
    """
    with (
        table.open("rb") as file,
        closing(_records(file, dialect, where.offset, where.line)) as records,
    ):
        for number, record in enumerate(records):
            if number == where.size:
                return
            if record.problem is not None:
                yield DelimitedRow(record.line, {}, record.problem)
                continue
            try:
                cells = _cells(record.lines, dialect)
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
    offset: int
    line: int
    lines: list[bytes]
    problem: str | None = None


class _Unclosed(Exception):
    """A quoted field goes on for too long."""


def _records(
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
            lines, problem = _quoted(lines[0], file, waiting, dialect)
        offset = begin + sum(map(len, lines))
        line += len(lines)
        if lines[0].strip(b"\r\n"):
            yield _Record(begin, number, lines, problem)


def _quoted(
    first: bytes, file: IO[bytes], waiting: deque[bytes], dialect: Dialect
) -> tuple[list[bytes], str | None]:
    """The lines of the row that begins with `first`, and what is wrong with it."""
    taken = [first]

    def feed() -> Iterator[str]:
        yield first.decode("utf-8", _ERRORS)
        while True:
            more = waiting.popleft() if waiting else file.readline()
            if more:
                taken.append(more)
            if not more or len(taken) > _LONGEST:
                raise _Unclosed
            yield more.decode("utf-8", _ERRORS)

    try:
        next(csv.reader(feed(), delimiter=dialect.delimiter))
    except _Unclosed:
        waiting.extendleft(reversed(taken[1:]))
        return [first], "unreadable row: a quote is opened and not closed"
    except csv.Error as error:
        return taken, f"unreadable row: {error}"
    return taken, None


def _cells(lines: Sequence[bytes], dialect: Dialect) -> list[str]:
    texts = [part.decode("utf-8", _ERRORS) for part in lines]
    if dialect.quoted:
        return next(csv.reader(iter(texts), delimiter=dialect.delimiter), [])
    return [_unquoted(cell) for cell in texts[0].rstrip("\r\n").split(dialect.delimiter)]


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell
