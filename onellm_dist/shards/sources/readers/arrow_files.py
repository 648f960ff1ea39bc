"""Rows of parquet and Arrow files, some at a time, in bounded memory.

A part of a file can be read by itself: a row group of a parquet file, or some record batches of an
Arrow file (`datasets.save_to_disk`). How many rows are decoded at a time follows from the sizes in
the footer, because a value that is stored once may stand in a million rows. A file whose footer
promises more than its bytes can hold is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from onellm_dist.common.errors import OneLLMError, UsageError

if TYPE_CHECKING:
    import pyarrow

_BUDGET = 1 << 26
"""Bytes that are decoded at a time; one row may be larger."""
_MOST_ROWS = 1000
_BUFFER = 1 << 20
_LARGE = 1 << 28
_MOST_PACKED = 1000
"""Times that a row group of more than _LARGE bytes may be larger than the file."""
_MOST_ROWS_A_BYTE = 100
"""Rows of a parquet file for each of its bytes."""
_ARROW_ROWS = 1000
"""Rows of an Arrow file from which on a part ends."""


class ArrowPart(NamedTuple):
    """A part of a file that is read by itself."""

    first: int
    """Number of the part's row group, or of its first record batch."""
    pieces: int
    """How many row groups or record batches the part has."""
    rows: int
    start: int
    """Rows of the file before it."""


class ArrowRow(NamedTuple):
    """One row."""

    values: dict[str, Any]
    """Column to value, as Python has it."""
    problem: str | None = None
    """Why the row cannot be read."""


def read_schema(path: Path) -> pyarrow.Schema:
    """Read the columns of a file.

    Raises:
        OneLLMError: it is not a parquet or Arrow file, or is damaged.
    """
    with _open(path) as file:
        if is_parquet(path):
            schema = _open_parquet(path, file).schema_arrow
        else:
            schema = _open_arrow(file)[0]
        _check_names(schema)
        return schema


def _check_names(fields: Iterable[pyarrow.Field]) -> None:
    """Read all names, those of nested columns too.

    Raises:
        UnicodeDecodeError: one is not UTF-8, which pyarrow notices where it is used.
    """
    from pyarrow import types

    for field in fields:
        _ = field.name
        if types.is_struct(field.type):
            _check_names([field.type.field(i) for i in range(field.type.num_fields)])
        elif hasattr(field.type, "value_field"):
            _check_names([field.type.value_field])


def list_parts(path: Path) -> list[ArrowPart]:
    """List the parts of a file, in order.

    Raises:
        OneLLMError: it is not a parquet or Arrow file, or is damaged.
    """
    with _open(path) as file:
        if not is_parquet(path):
            return _list_batches(file)
        parts, start = list[ArrowPart](), 0
        meta = _open_parquet(path, file).metadata
        for number in range(meta.num_row_groups):
            rows = meta.row_group(number).num_rows
            parts.append(ArrowPart(number, 1, rows, start))
            start += rows
        return parts


def count_parquet_rows(path: Path) -> int:
    """Count the rows of a parquet file by its footer.

    Raises:
        OneLLMError: the file cannot be read.
    """
    with _open(path) as file:
        return int(_open_parquet(path, file).metadata.num_rows)


def read_rows(
    path: Path, parts: Sequence[ArrowPart] | None = None, columns: Sequence[str] | None = None
) -> Iterator[ArrowRow]:
    """Read the rows of some parts of a file, in order.

    Args:
        path: the file.
        parts: which parts; None: all.
        columns: the wanted columns; None: all.

    Raises:
        OneLLMError: the file cannot be read.
    """
    with _open(path) as file:
        batches = (
            _read_parquet(path, file, parts, columns)
            if is_parquet(path)
            else _read_arrow(file, parts, columns)
        )
        for batch in batches:
            yield from _convert(batch)


def is_parquet(path: Path) -> bool:
    """Check the suffix: every other file is one of Arrow."""
    return path.suffix.lower() == ".parquet"


class _BoundedFile:
    """A file for pyarrow that is never asked for more than it has.

    Python allocates all that is asked for, and a damaged length asks for much.
    """

    closed = False

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))

    def close(self) -> None:
        """Nothing: the file is closed by who opened it."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """Open a file; pyarrow's errors become ours."""
    import pyarrow

    try:
        with path.open("rb") as file:
            yield cast("IO[bytes]", _BoundedFile(file, path.stat().st_size))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        # Some of pyarrow's errors are OSErrors, ValueErrors or KeyErrors alone.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise OneLLMError(
            f"{path}: {first}",
            "its rows cannot be read.",
            "fetch it again; it may be cut short or of another kind.",
        ) from error


def _open_parquet(path: Path, file: IO[bytes]) -> Any:
    """Open a parquet file whose footer can be true.

    Raises:
        UsageError: it promises more rows or bytes than it can hold.
    """
    from pyarrow import parquet

    # Buffered: a column is decoded page by page, and not read as a whole before.
    opened = parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
    size, meta = path.stat().st_size, opened.metadata
    if meta.num_rows > _MOST_ROWS_A_BYTE * size:
        raise _make_bomb_error(path, f"{size} bytes hold {meta.num_rows} rows")
    for number in range(meta.num_row_groups):
        # Not of its columns: for some damaged footers pyarrow ends the process there.
        unpacked = meta.row_group(number).total_byte_size
        if unpacked > max(_LARGE, size * _MOST_PACKED):
            raise _make_bomb_error(path, f"{size} bytes unpack to {unpacked} in row group {number}")
    return opened


def _make_bomb_error(path: Path, how: str) -> UsageError:
    return UsageError(
        f"{path}: by its footer {how}.",
        "a file of samples is not like this, and reading it could fill the memory.",
        "fetch it again, or write it anew with smaller row groups.",
    )


def _read_parquet(
    path: Path, file: IO[bytes], parts: Sequence[ArrowPart] | None, columns: Sequence[str] | None
) -> Iterator[Any]:
    opened = _open_parquet(path, file)
    numbers = range(opened.metadata.num_row_groups) if parts is None else [p.first for p in parts]
    for number in numbers:
        size = _choose_batch_size(opened.metadata.row_group(number))
        yield from opened.iter_batches(
            batch_size=size, row_groups=[number], columns=columns, use_threads=False
        )


def _choose_batch_size(group: Any) -> int:
    """Choose how many rows to decode at a time, at most about _BUDGET bytes.

    A value of a dictionary is stored once, and decoded for every row that has it: each row counts
    as if it had all of the row group.
    """
    rows = min(_MOST_ROWS, _BUDGET // max(1, group.total_byte_size))
    return max(1, int(rows))


def _open_arrow(file: IO[bytes]) -> tuple[Any, Iterator[Any]]:
    """Return the schema and the record batches of an Arrow file, of either format."""
    import pyarrow

    stream = file.read(6) != b"ARROW1"
    file.seek(0)
    if stream:
        reader = pyarrow.ipc.open_stream(file)
        return reader.schema, iter(reader)
    opened = pyarrow.ipc.open_file(file)
    return opened.schema, (opened.get_batch(i) for i in range(opened.num_record_batches))


def _list_batches(file: IO[bytes]) -> list[ArrowPart]:
    parts, start, first, rows, number = list[ArrowPart](), 0, 0, 0, -1
    for number, batch in enumerate(_open_arrow(file)[1]):
        rows += batch.num_rows
        if rows >= _ARROW_ROWS:
            parts.append(ArrowPart(first, number + 1 - first, rows, start))
            start, first, rows = start + rows, number + 1, 0
    if rows:
        parts.append(ArrowPart(first, number + 1 - first, rows, start))
    return parts


def _read_arrow(
    file: IO[bytes], parts: Sequence[ArrowPart] | None, columns: Sequence[str] | None
) -> Iterator[Any]:
    wanted = None if parts is None else {p.first + i for p in parts for i in range(p.pieces)}
    for number, batch in enumerate(_open_arrow(file)[1]):
        if wanted is not None and number > max(wanted, default=-1):
            return
        if wanted is None or number in wanted:
            batch.validate(full=True)  # a damaged file could name bytes outside of the batch
            yield batch if columns is None else batch.select(list(columns))


def _convert(batch: Any) -> Iterator[ArrowRow]:
    """Convert a batch to rows; text that is not UTF-8 costs its own row."""
    try:
        yield from [ArrowRow(values) for values in batch.to_pylist()]
    except (ValueError, OverflowError):
        for number in range(batch.num_rows):
            try:
                (values,) = batch.slice(number, 1).to_pylist()
                yield ArrowRow(values)
            except (ValueError, OverflowError) as error:
                yield ArrowRow({}, f"unreadable row: {error}")
