"""Rows of large JSON files, by byte range: a plan goes through the file once, and no process ever holds more than one group of it.

A row is an element of an array (`[{...}, ...]`, or the array under a key: `{"annotations": [...]}`), an entry of an object
(`{"2354786": {...}}`), or a line (`.jsonl`). Annotation files of several GB (Visual Genome's regions, Ego4D's narrations) are
read like small ones.
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
"""Bytes of one row beyond which the file is taken for broken."""
_MOST = 8
"""Rows of a group for each raw_sample that it is to have: where most rows are of another split."""
_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonRow(NamedTuple):
    """One row while a file is gone through."""

    start: int
    """Byte offset of its first character (of an entry: of its key)."""
    end: int
    key: str
    """An entry's key; empty in arrays and lines."""
    value: Any
    """Parsed as Latin-1, so that characters are bytes: good for ASCII keys and values alone."""


class _JsonScanner:
    """A cursor in a JSON file. Its text is Latin-1, where a character is a byte: JSON's own characters are ASCII."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file, self.name = file, name
        self.text, self.at, self.base, self.ended = "", 0, 0, False

    @property
    def offset(self) -> int:
        return self.base + self.at

    def more(self, size: int = _CHUNK) -> None:
        """Reads on; drops what lies behind the cursor."""
        data = self.file.read(size)
        self.ended = not data
        self.text = self.text[self.at :] + data.decode("latin-1")
        self.base, self.at = self.base + self.at, 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def take(self, wanted: str) -> None:
        """Goes past the next character.

        Raises:
            OneLLMError: it is another one.
        """
        found = self.peek()
        if found != wanted:
            raise self.broken(
                f"{found!r} where {wanted!r} is expected" if found else "it ends there"
            )
        self.at += 1

    def value(self) -> Any:
        """Goes past the next value and returns it.

        Raises:
            OneLLMError: it is no JSON, or has no end.
        """
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self.text, self.at)
            except ValueError as error:
                if self.ended or len(self.text) - self.at > _LARGEST:
                    raise self.broken(
                        f"{error.args[0].split(':')[0] if error.args else error}"
                    ) from error
            else:
                if end < len(self.text) or self.ended:  # a number at the buffer's end may go on
                    self.at = end
                    return found
            self.more(max(_CHUNK, len(self.text) - self.at))

    def rows(self) -> Iterator[JsonRow]:
        """The elements or entries of the array or object that begins here; goes past it."""
        opening = self.peek()
        closing = {"[": "]", "{": "}"}.get(opening)
        if closing is None:
            raise self.broken(f"{opening!r} where a list or an object is expected")
        self.take(opening)
        while self.peek() != closing:
            start, key = self.offset, ""
            if opening == "{":
                key = self.value()
                if not isinstance(key, str):
                    raise self.broken("a key that is no text")
                self.take(":")
            found = self.value()
            yield JsonRow(start, self.offset, key, found)
            if self.peek() != closing:
                self.take(",")
        self.take(closing)

    def skip(self) -> None:
        """Goes past the next value without holding more than one row of it."""
        if self.peek() in ("[", "{"):
            for _ in self.rows():
                pass
        else:
            self.value()

    def find(self, key: str) -> bool:
        """In an object that begins here, goes to the value of a key."""
        self.take("{")
        while self.peek() == '"':
            if self.value() == key:
                self.take(":")
                return True
            self.take(":")
            self.skip()
            if self.peek() == ",":
                self.take(",")
        return False

    def broken(self, how: str) -> OneLLMError:
        return OneLLMError(
            f"{self.name}: at byte {self.offset}: {how}.",
            "the rows behind this place cannot be told apart.",
            "fetch the file again; it may be cut short.",
        )


def scan_rows(path: Path, key: str | None = None) -> Iterator[JsonRow]:
    """The rows of a file in order.

    Args:
        key: the array or object under this key of the whole; None: the whole.

    Raises:
        UsageError: there is no such file or key.
        OneLLMError: it is no JSON; the rows before that place were yielded.
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
            yield from _lines(file)
            return
        scanner = _scanner(file, path)
        if key is not None and (scanner.peek() != "{" or not scanner.find(key)):
            raise UsageError(
                f"{path.name} has no key {key!r}.",
                "its rows are expected there.",
                "is it the right file?",
            )
        yield from scanner.rows()


def _scanner(file: IO[bytes], path: Path) -> _JsonScanner:
    """At the start of a file, behind its byte order mark."""
    scanner = _JsonScanner(file, path.name)
    scanner.more()
    scanner.at = 3 if scanner.text.startswith("\xef\xbb\xbf") else 0
    return scanner


def _lines(file: IO[bytes]) -> Iterator[JsonRow]:
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
    """Whether a JSON file is an object with this key."""
    with path.open("rb") as file:
        scanner = _scanner(file, path)
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
    """Groups of about `rows` raw_samples of the file `name` in `inputs`; `read_rows` reads one.

    Args:
        key: as `scan`'s.
        count: a row's raw_samples by split; None: one, of `split`. Every split has groups of its own over the same rows.
        description: goes to every group's description.

    Raises:
        UsageError, OneLLMError: as `scan`.
    """
    path, start, end, first, number, held = (
        resolve_below(inputs, name),
        -1,
        0,
        0,
        0,
        dict[str, int](),
    )
    entries = False

    def groups() -> Iterator[InputSplit]:
        for part, raw_samples in sorted(held.items()):
            place = {
                "file": name,
                "start": start,
                "end": end,
                "first": first,
                "entries": entries,
                "split": part,
            }
            yield InputSplit(f"{name}:{first}", {**description, **place}, part, raw_samples)

    for number, row in enumerate(scan_rows(path, key)):
        if start < 0:
            start, first, entries = row.start, number, bool(row.key)
        for part, raw_samples in (count(row) if count is not None else {split: 1}).items():
            held[part] = held.get(part, 0) + raw_samples
        end = row.end
        if sum(held.values()) >= rows or number - first >= _MOST * rows:
            yield from groups()
            start, held = -1, {}
    if start >= 0:
        yield from groups()


class JsonItem(NamedTuple):
    """One row as a source reads it."""

    where: str
    number: int
    """In its file, from 0."""
    key: str
    value: Any
    """None: a line that is no JSON."""


def read_rows(inputs: Path, description: SplitDescription) -> Iterator[JsonItem]:
    """A group's rows.

    Raises:
        OneLLMError: the file is not what it was when the build was planned.
    """
    path = resolve_below(inputs, description["file"])
    with path.open("rb") as file:
        file.seek(description["start"])
        data = file.read(description["end"] - description["start"])
    lines = path.suffix == ".jsonl"
    try:
        found = list(_parsed_lines(data) if lines else _parsed(data, description["entries"]))
    except ValueError as error:
        raise _changed(path, description["start"], description["end"], error) from error
    for i, (key, value) in enumerate(found, description["first"]):
        yield JsonItem(f"{description['file']}[{key or i}]", i, key, value)


def read_rows_at(
    path: Path, places: Iterable[Sequence[int]], *, entries: bool = False
) -> Iterator[JsonItem]:
    """Single rows.

    Args:
        places: (number, start, end) of each, as `scan` gives them.
        entries: they are entries of an object.

    Raises:
        OneLLMError: the file is not what it was when the build was planned.
    """
    with path.open("rb") as file:
        for number, start, end in places:
            file.seek(start)
            try:
                [(key, value)] = _parsed(file.read(end - start), entries)
            except ValueError as error:
                raise _changed(path, start, end, error) from error
            yield JsonItem(f"{path.name}[{key or number}]", number, key, value)


def _changed(path: Path, start: int, end: int, error: ValueError) -> OneLLMError:
    return OneLLMError(
        f"{path}: bytes {start} to {end} are no rows any more ({error}).",
        "the input changed under the builder.",
        "put the input back, or begin anew with --restart.",
    )


def _parsed(data: bytes, entries: bool) -> Iterator[tuple[str, Any]]:
    text, at = (
        data.decode("utf-8", "surrogateescape"),
        0,
    )  # bytes that are not UTF-8 spoil their own row alone
    while at < len(text):
        key = ""
        if entries:
            key, at = _DECODER.raw_decode(text, at)
            at = _space(text, _space(text, at) + 1)  # past the colon
        value, at = _DECODER.raw_decode(text, at)
        yield key, value
        at = _space(text, _space(text, at) + 1)  # past the comma


def _space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _parsed_lines(data: bytes) -> Iterator[tuple[str, Any]]:
    for line in data.split(
        b"\n"
    ):  # as the scan does; splitlines() would end a line at a lone \r too
        if line.strip():
            try:
                yield "", _DECODER.decode(line.decode("utf-8", "surrogateescape").strip())
            except ValueError:
                yield "", None
