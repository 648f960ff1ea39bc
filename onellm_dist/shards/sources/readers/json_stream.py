"""Rows of large JSON files, read by byte range.

A row is an element of an array (`[{...}, ...]`, or the array under a key: `{"annotations":
[...]}`), an entry of an object (`{"2354786": {...}}`), or a line (also in a file that is called
`.json`). A plan scans the file once and notes byte ranges; then each process reads the range of its
input split alone. Annotation files of several GB (Visual Genome's regions, Ego4D's narrations) are
read like small ones. What stands behind the rows is read too: a second list, or text behind the
end, is an error and not passed over.

This is written by hand because streaming JSON parsers (ijson, json-stream) yield values without
their byte offsets, and without offsets every process would parse the file from its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.sources.base import InputSplit, SplitDescription
from onellm_dist.shards.sources.readers.json_scanner import (
    DECODER,
    SPACE,
    JsonRow,
    open_scanner,
)
from onellm_dist.shards.sources.readers.media_files import resolve_below
from onellm_dist.shards.sources.readers.text_files import JSON_LINES, has_json_lines

_MOST_ROWS = 8
"""Rows per wanted raw sample at which an input split ends, if most rows are of another split."""
_BOM = b"\xef\xbb\xbf"


def scan_rows(path: Path, key: str | None = None) -> Iterator[JsonRow]:
    """Yield the rows of a file in order.

    Args:
        path: the file.
        key: the key under which the array or object of rows stands; None: the file itself is it.

    Raises:
        UsageError: there is no such file or key.
        OneLLMError: the file is not JSON; the rows before the broken place were yielded.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: there is no such file.",
            "it lists the samples.",
            "check the input folder and the options.",
        ) from error
    with file:
        if key is None and has_json_lines(path):
            yield from _scan_lines(file)
            return
        scanner = open_scanner(file, path)
        if key is not None and (scanner.peek() != "{" or not scanner.find(key)):
            raise UsageError(
                f"{path.name} has no key {key!r}.",
                "its rows are expected there.",
                "is it the right file?",
            )
        yield from scanner.read_rows()
        scanner.read_end(key)


def _scan_lines(file: IO[bytes]) -> Iterator[JsonRow]:
    offset = 0
    for line in file:
        start = offset
        if not offset and line.startswith(_BOM):
            start = len(_BOM)
        if line[start - offset :].strip():
            yield JsonRow(start, offset + len(line), "", _parse_line(line[start - offset :]))
        offset += len(line)


def _parse_line(line: bytes, encoding: str = "latin-1") -> Any:
    """Parse a line of JSON; None: it is not JSON."""
    try:
        return DECODER.decode(line.decode(encoding, "surrogateescape").strip())
    except (ValueError, RecursionError):
        return None


def has_key(path: Path, key: str) -> bool:
    """Check whether a JSON file is an object with this key."""
    with path.open("rb") as file:
        scanner = open_scanner(file, path)
        return scanner.peek() == "{" and scanner.find(key)


def split_rows(
    inputs: Path,
    name: str,
    rows: int,
    *,
    key: str | None = None,
    count: Callable[[JsonRow], Mapping[str, int]] | None = None,
    split: str = "train",
    **description: Any,
) -> Iterator[InputSplit]:
    """Split the rows of a file into input splits, each of which `read_rows` reads.

    Args:
        inputs: the input folder.
        name: the file, relative to `inputs`.
        rows: about how many raw samples an input split has.
        key: as in `scan_rows`.
        count: row to its number of raw samples by dataset split; None: one, of `split`. Every
            dataset split has input splits of its own over the same rows.
        split: the dataset split if `count` is None.
        description: further values for every input split's description.

    Raises:
        UsageError: as in `scan_rows`.
        OneLLMError: as in `scan_rows`.
    """
    path = resolve_below(inputs, name)
    start = -1
    end = 0
    first = 0
    counts = dict[str, int]()
    entries = False
    lines = False

    def make_splits() -> Iterator[InputSplit]:
        for part, samples in sorted(counts.items()):
            place = {
                "file": name,
                "start": start,
                "end": end,
                "first": first,
                "entries": entries,
                "lines": lines,
                "split": part,
            }
            yield InputSplit(f"{name}:{first}", {**description, **place}, part, samples)

    for number, row in enumerate(scan_rows(path, key)):
        if start < 0:
            start, first, entries = row.start, number, bool(row.key)
            lines = key is None and has_json_lines(path) if not number else lines
        for part, samples in (count(row) if count is not None else {split: 1}).items():
            counts[part] = counts.get(part, 0) + samples
        end = row.end
        if sum(counts.values()) >= rows or number - first >= _MOST_ROWS * rows:
            yield from make_splits()
            start = -1
            counts = {}
    if start >= 0:
        yield from make_splits()


class JsonItem(NamedTuple):
    """One row as a source reads it."""

    where: str
    """Position of the row for messages: `file.json[17]`."""
    number: int
    """Number of the row in the file, from 0."""
    key: str
    """The key of an entry; empty in arrays and lines."""
    value: Any
    """The value; None if a line is not JSON."""


def read_rows(inputs: Path, description: SplitDescription) -> Iterator[JsonItem]:
    """Read the rows of an input split.

    Raises:
        OneLLMError: the file has changed since the build was planned.
    """
    path = resolve_below(inputs, description["file"])
    with path.open("rb") as file:
        file.seek(description["start"])
        data = file.read(description["end"] - description["start"])
    lines = description.get("lines", path.suffix in JSON_LINES)
    try:
        found = list(_parse_lines(data) if lines else _parse_rows(data, description["entries"]))
    except (ValueError, RecursionError) as error:
        raise _changed_error(path, description["start"], description["end"], error) from error
    for i, (key, value) in enumerate(found, description["first"]):
        yield JsonItem(f"{description['file']}[{key or i}]", i, key, value)


def read_rows_at(
    path: Path, places: Iterable[Sequence[int]], *, entries: bool = False
) -> Iterator[JsonItem]:
    """Read single rows.

    Args:
        path: the file.
        places: (number, start, end) of each row, from `scan_rows`.
        entries: whether the rows are entries of an object.

    Raises:
        OneLLMError: the file has changed since the build was planned.
    """
    lines = not entries and has_json_lines(path)
    with path.open("rb") as file:
        for number, start, end in places:
            file.seek(start)
            data = file.read(end - start)
            try:
                [(key, value)] = _parse_lines(data) if lines else _parse_rows(data, entries)
            except (ValueError, RecursionError) as error:
                raise _changed_error(path, start, end, error) from error
            yield JsonItem(f"{path.name}[{key or number}]", number, key, value)


def _changed_error(path: Path, start: int, end: int, error: Exception) -> OneLLMError:
    return OneLLMError(
        f"{path}: bytes {start} to {end} are not rows any more ({error}).",
        "the input changed during the build.",
        "restore the input, or start over with --restart.",
    )


def _parse_rows(data: bytes, entries: bool) -> Iterator[tuple[str, Any]]:
    text = data.decode("utf-8", "surrogateescape")  # bytes that are not UTF-8 affect one row alone
    at = 0
    while at < len(text):
        key = ""
        if entries:
            key, at = DECODER.raw_decode(text, at)
            at = _skip_space(text, _skip_space(text, at) + 1)  # past the colon
        value, at = DECODER.raw_decode(text, at)
        yield key, value
        at = _skip_space(text, _skip_space(text, at) + 1)  # past the comma


def _skip_space(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def _parse_lines(data: bytes) -> Iterator[tuple[str, Any]]:
    # As in the scan; splitlines() would end a line at a lone \r too.
    for line in data.split(b"\n"):
        if line.strip():
            yield "", _parse_line(line, "utf-8")
