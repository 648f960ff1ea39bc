"""Objects of a large JSON list, read one by one and reached by byte offset: a file of any size takes a few MB of memory.

The list is the file itself, or the value of one key of an object (`{"num_captions_per_audio": 1, "data": [...]}`).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from onellm_dist.errors import OneLLMError, UsageError

_CHUNK = 1 << 20
_LARGEST = 64 << 20
"""Characters of one object."""
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()


class ObjectRange(NamedTuple):
    """Consecutive objects of a list."""

    offset: int
    """Byte at which the first one begins."""
    first: int
    """Its number in the list, from 0."""
    size: int
    """Objects."""


def object_ranges(table: Path, key: str | None, size: int) -> Iterator[ObjectRange]:
    """The list in ranges of `size` objects.

    Args:
        key: where the list stands, if the file is an object.

    Raises:
        UsageError: no such list in the file.
        OneLLMError: it is cut short or damaged.
    """
    offset, number, count = 0, 0, 0
    with table.open("rb") as file:
        start = list_start(file, table, key)
        for begin, _ in _objects(file, table, start):
            if count == size:
                yield ObjectRange(offset, number, count)
                number, count = number + count, 0
            if not count:
                offset = begin
            count += 1
    if count:
        yield ObjectRange(offset, number, count)


def read_objects(table: Path, where: ObjectRange) -> Iterator[tuple[int, Any]]:
    """(number in the list, value) of each object of a range."""
    with table.open("rb") as file:
        for number, (_, value) in zip(range(where.first, where.first + where.size), _objects(file, table, where.offset), strict=False):
            yield number, value


def list_start(file: IO[bytes], table: Path, key: str | None) -> int:
    """Offset of the first byte behind the list's `[`.

    Raises:
        UsageError: there is no such list.
    """
    head = file.read(_CHUNK)
    top = re.match(rb"(?:\xef\xbb\xbf)?\s*\[", head)
    inside = None if key is None else re.search(b'"' + re.escape(key.encode()) + rb'"\s*:\s*\[', head)
    found = top or inside
    if found is None:
        expected = "a list" if key is None else f'a list, or an object with a list "{key}"'
        raise UsageError(f"{table} is no JSON file that holds {expected}.", "a sample is one object of it.", "check the path.")
    return found.end()


def _objects(file: IO[bytes], table: Path, offset: int) -> Iterator[tuple[int, Any]]:
    """(byte offset, value) of each element from `offset` on, to the list's end."""
    file.seek(offset)
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, place, ended = "", 0, False
    while True:
        gap = _BETWEEN.match(text, place)
        after = gap.end() if gap is not None else place
        offset += after - place  # white space and commas are single bytes
        place = after
        if place < len(text) and text[place] == "]":
            return
        try:
            value, end = _DECODER.raw_decode(text, place)
            whole = end < len(text) or ended  # a number may go on in the next chunk
        except ValueError as error:
            if ended or len(text) - place > _LARGEST:
                raise _damaged(table, offset, error) from error
            whole = False
        if whole:
            yield offset, value
            offset += len(text[place:end].encode("utf-8", "surrogateescape"))
            place = end
        else:
            data = file.read(_CHUNK)
            text, place, ended = text[place:] + decoder.decode(data, final=not data), 0, not data


def _damaged(table: Path, offset: int, error: ValueError) -> OneLLMError:
    return OneLLMError(
        f"{table}: no whole JSON object at byte {offset} ({error}).",
        "the rows behind this place cannot be told apart.",
        "fetch it again (it may be cut short), or repair it.",
    )
