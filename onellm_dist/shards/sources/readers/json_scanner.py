"""A cursor that finds the values of a large JSON file, with their byte offsets.

json_stream.py says why this is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from onellm_dist.common.errors import OneLLMError
from onellm_dist.shards.sources.readers.text_files import check_text

_CHUNK = 1 << 20
_LARGEST = 1 << 28
"""Bytes of one row above which the file counts as broken."""
DECODER = json.JSONDecoder(strict=False)
SPACE = re.compile(r"[ \t\r\n]*")


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


class JsonScanner:
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
            match = SPACE.match(self.text, self.at)
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
                found, end = DECODER.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self.make_error("it is nested too deeply") from error
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

    def read_end(self, key: str | None) -> None:
        """Move behind the document whose rows were read, to the end of the file.

        Args:
            key: the key under which the rows stood; None: they were the document itself.

        Raises:
            OneLLMError: the key stands there again, or something follows the document.
        """
        while key is not None and self.peek() == ",":
            self.expect(",")
            if self.peek() == '"' and self.read_value() == key:
                raise self.make_error(f"the key {key!r} stands there again, with other rows")
            self.expect(":")
            self.skip()
        if key is not None:
            self.expect("}")
        if found := self.peek():
            raise self.make_error(
                f"{found!r} where the file should end: it holds several JSON values, one after "
                "another. Write them as one list, or one a line"
            )

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


def open_scanner(file: IO[bytes], path: Path) -> JsonScanner:
    """Make a scanner at the start of a file, after its byte order mark."""
    check_text(path, file.read(64))
    file.seek(0)
    scanner = JsonScanner(file, path.name)
    scanner.read_more()
    scanner.at = 3 if scanner.text.startswith("\xef\xbb\xbf") else 0
    return scanner
