"""What is said of a table or list that is not UTF-8 text, and which form a JSON file has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from onellm_dist.common.errors import UsageError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
"""Suffixes, in lower case, of files with one JSON value a line."""
JSON_SUFFIXES = (".json", *JSON_LINES)
_HEAD = 64
_LONGEST = 1 << 22
"""Bytes of a first line above which a file is taken for one JSON document."""
_NOT_TEXT = {
    b"\x1f\x8b": ("compressed by gzip", "unpack it (gunzip)"),
    b"PK\x03\x04": ("a zip, as .xlsx and .ods are too", "unpack it, or save the table as CSV"),
    b"\xd0\xcf\x11\xe0": ("an Excel file (.xls)", "save the table as CSV (UTF-8)"),
    b"(\xb5/\xfd": ("compressed by zstd", "unpack it (unzstd)"),
    b"BZh": ("compressed by bzip2", "unpack it (bunzip2)"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it (unxz)"),
    b"PAR1": ("a parquet file", "use the source parquet"),
    b"ARROW1": ("an Arrow file", "use the source parquet"),
    b"\xff\xfe": ("UTF-16, not UTF-8", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    b"\xfe\xff": ("UTF-16, not UTF-8", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
}
"""First bytes to what such a file is, and what to do."""
_UTF16 = _NOT_TEXT[b"\xff\xfe"]


def check_text(path: Path, head: bytes) -> None:
    """Check that a file which should be a table or a list of JSON can be UTF-8 text.

    Args:
        path: the file, for the error.
        head: its first bytes.

    Raises:
        UsageError: it is compressed, a spreadsheet, or in another encoding.
    """
    found = next((said for magic, said in _NOT_TEXT.items() if head.startswith(magic)), None)
    if found is None and len(head) > 3 and (not any(head[:40:2]) or not any(head[1:40:2])):
        found = _UTF16  # without a byte order mark, ASCII text has a NUL in every other byte
    if found is not None:
        raise UsageError(
            f"{path} is {found[0]}.", "its rows are read as UTF-8 text.", f"{found[1]}."
        )


def has_json_lines(path: Path) -> bool:
    """Check whether a JSON file has one value a line, rather than one list or object.

    The content decides, so JSON lines in a `.json` and a list in a `.jsonl` are read as what they
    are. Several objects that each span lines are one document, which ends too early.

    Raises:
        UsageError: it is not UTF-8 text (`check_text`).
    """
    with path.open("rb") as file:
        check_text(path, file.read(_HEAD))
        file.seek(0)
        lines = _read_filled_lines(file)
        first = next(lines, b"")
        named, is_list = path.suffix.lower() in JSON_LINES, first.startswith(b"[")
        if is_list != named:
            return named  # the usual two
        value = _parse(first)
        more = bool(value is not None and next(lines, b""))
    if is_list or not isinstance(value, dict):
        return is_list and more
    # One object on one line is a row, unless most of its values are rows themselves.
    rows = sum(isinstance(v, dict) for v in value.values())
    return more or 2 * rows < len(value)


def _read_filled_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines that are not blank, without the byte order mark."""
    start = True
    while line := file.readline(_LONGEST):
        text = line.removeprefix(b"\xef\xbb\xbf").strip() if start else line.strip()
        start = False
        if text:
            yield text


def _parse(line: bytes) -> Any:
    """Parse a line; None: it is not a complete JSON value."""
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"), strict=False)
    except (ValueError, RecursionError):
        return None
