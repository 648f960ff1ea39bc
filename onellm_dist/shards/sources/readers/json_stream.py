"""Rows of large JSON files, read by byte range.

A row is an element of an array (`[{...}, ...]`, or the array under a key: `{"annotations":
[...]}`), an entry of an object (`{"2354786": {...}}`), or a line (`.jsonl`). A plan scans the file
once and notes byte ranges; then each process reads the range of its input split alone. Annotation
files of several GB (Visual Genome's regions, Ego4D's narrations) are read like small ones.

This is written by hand because streaming JSON parsers (ijson, json-stream) yield values without
their byte offsets, and without offsets every process would parse the file from its start.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.sources.base import InputSplit, SplitDescription
from onellm_dist.shards.sources.readers.media_files import resolve_below

_CHUNK = 1 << 20
_LARGEST = 1 << 28
"""Bytes of one row above which the file counts as broken."""
_MOST_ROWS = 8
"""Rows per wanted raw sample at which an input split ends, if most rows are of another split."""
_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonRow(NamedTuple):
    """One row, found while a file is scanned."""

    start: int
    """Byte offset of its first character (of an entry: of its key)."""
    end: int
    """Byte offset behind its last character."""
    key: str
    """The key of an entry; empty in arrays and lines."""
    value: Any
    """The value, parsed as Latin-1 so that characters are bytes; only ASCII text is right."""


class _JsonScanner:
    """A cursor in a JSON file.

    Its text is Latin-1, where a character is a byte. JSON's own characters are ASCII.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file = file
        self.name = name
        self.text = ""
        self.at = 0
        self.base = 0
        self.ended = False

    @property
    def offset(self) -> int:
        """The cursor's byte offset in the file."""
        return self.base + self.at

    def read_more(self, size: int = _CHUNK) -> None:
        """Read on, and drop the text before the cursor."""
        data = self.file.read(size)
        self.ended = not data
        self.text = self.text[self.at :] + data.decode("latin-1")
        self.base += self.at
        self.at = 0

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.read_more()

    def expect(self, wanted: str) -> None:
        """Move past the next character.

        Raises:
            OneLLMError: it is not `wanted`.
        """
        found = self.peek()
        if found != wanted:
            raise self.make_error(
                f"{found!r} where {wanted!r} is expected" if found else "it ends there"
            )
        self.at += 1

    def read_value(self) -> Any:
        """Return the next value and move past it.

        Raises:
            OneLLMError: it is not JSON, or has no end.
        """
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self.text, self.at)
            except ValueError as error:
                if self.ended or len(self.text) - self.at > _LARGEST:
                    reason = error.args[0].split(":")[0] if error.args else error
                    raise self.make_error(f"{reason}") from error
            else:
                if end < len(self.text) or self.ended:  # a number at the buffer's end may continue
                    self.at = end
                    return found
            self.read_more(max(_CHUNK, len(self.text) - self.at))

    def read_rows(self) -> Iterator[JsonRow]:
        """Yield the elements or entries of the array or object that begins here."""
        opening = self.peek()
        closing = {"[": "]", "{": "}"}.get(opening)
        if closing is None:
            raise self.make_error(f"{opening!r} where a list or an object is expected")
        self.expect(opening)
        while self.peek() != closing:
            start, key = self.offset, ""
            if opening == "{":
                key = self.read_value()
                if not isinstance(key, str):
                    raise self.make_error("a key that is not text")
                self.expect(":")
            found = self.read_value()
            yield JsonRow(start, self.offset, key, found)
            if self.peek() != closing:
                self.expect(",")
        self.expect(closing)

    def skip(self) -> None:
        """Move past the next value, holding at most one row of it."""
        if self.peek() in ("[", "{"):
            for _ in self.read_rows():
                pass
        else:
            self.read_value()

    def find(self, key: str) -> bool:
        """Move to the value of a key in the object that begins here; false if it has none."""
        self.expect("{")
        while self.peek() == '"':
            if self.read_value() == key:
                self.expect(":")
                return True
            self.expect(":")
            self.skip()
            if self.peek() == ",":
                self.expect(",")
        return False

    def make_error(self, how: str) -> OneLLMError:
        """The error for broken JSON at the cursor."""
        return OneLLMError(
            f"{self.name}: at byte {self.offset}: {how}.",
            "the rows after this place cannot be read.",
            "fetch the file again; it may be cut short.",
        )


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
        if path.suffix == ".jsonl":
            yield from _scan_lines(file)
            return
        scanner = _open_scanner(file, path)
        if key is not None and (scanner.peek() != "{" or not scanner.find(key)):
            raise UsageError(
                f"{path.name} has no key {key!r}.",
                "its rows are expected there.",
                "is it the right file?",
            )
        yield from scanner.read_rows()


def _open_scanner(file: IO[bytes], path: Path) -> _JsonScanner:
    """A scanner at the start of a file, after its byte order mark."""
    scanner = _JsonScanner(file, path.name)
    scanner.read_more()
    scanner.at = 3 if scanner.text.startswith("\xef\xbb\xbf") else 0
    return scanner


def _scan_lines(file: IO[bytes]) -> Iterator[JsonRow]:
    offset = 0
    for line in file:
        if line.strip():
            try:
                value = _DECODER.decode(line.decode("latin-1").strip())
            except ValueError:
                value = None
            yield JsonRow(offset, offset + len(line), "", value)
        offset += len(line)


def has_key(path: Path, key: str) -> bool:
    """Check whether a JSON file is an object with this key."""
    with path.open("rb") as file:
        scanner = _open_scanner(file, path)
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

    def make_splits() -> Iterator[InputSplit]:
        for part, samples in sorted(counts.items()):
            place = {
                "file": name,
                "start": start,
                "end": end,
                "first": first,
                "entries": entries,
                "split": part,
            }
            yield InputSplit(f"{name}:{first}", {**description, **place}, part, samples)

    for number, row in enumerate(scan_rows(path, key)):
        if start < 0:
            start, first, entries = row.start, number, bool(row.key)
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
    """Its place for messages: `file.json[17]`."""
    number: int
    """Its number in the file, from 0."""
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
    lines = path.suffix == ".jsonl"
    try:
        found = list(_parse_lines(data) if lines else _parse_rows(data, description["entries"]))
    except ValueError as error:
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
    with path.open("rb") as file:
        for number, start, end in places:
            file.seek(start)
            try:
                [(key, value)] = _parse_rows(file.read(end - start), entries)
            except ValueError as error:
                raise _changed_error(path, start, end, error) from error
            yield JsonItem(f"{path.name}[{key or number}]", number, key, value)


def _changed_error(path: Path, start: int, end: int, error: ValueError) -> OneLLMError:
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
            key, at = _DECODER.raw_decode(text, at)
            at = _skip_space(text, _skip_space(text, at) + 1)  # past the colon
        value, at = _DECODER.raw_decode(text, at)
        yield key, value
        at = _skip_space(text, _skip_space(text, at) + 1)  # past the comma


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _parse_lines(data: bytes) -> Iterator[tuple[str, Any]]:
    # As in the scan; splitlines() would end a line at a lone \r too.
    for line in data.split(b"\n"):
        if line.strip():
            try:
                yield "", _DECODER.decode(line.decode("utf-8", "surrogateescape").strip())
            except ValueError:
                yield "", None
