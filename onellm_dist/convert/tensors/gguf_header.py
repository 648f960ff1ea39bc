"""The header of a GGUF file, read in bounded time before the package `gguf` reads it.

That package believes the numbers of a header: a damaged length makes it run for ever.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.tensors.archive import make_read_error

MAGIC = b"GGUF"
MOST_ENTRIES = 1_000_000
"""Values of an array (a vocabulary has 256,000), keys, or tensors."""
LARGEST_TEXT = 64 << 20
LARGEST_HEADER = 256 << 20
KEPT = 64
"""Values of an array that are kept; of longer ones (vocabularies) none is."""
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself.

    Attributes:
        values: key -> number, text, or short list; an empty tuple for longer lists.
        shapes: name of each tensor -> its sizes, the innermost first.
    """

    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins with GGUF's magic."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file, and check that what it describes lies in the file.

    Raises:
        UsageError: not a GGUF file of version 2 or 3, little-endian, or damaged.
    """
    try:
        with path.open("rb") as file:
            return _Parser(file, path.stat().st_size).parse()
    except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
        if not is_gguf(path):
            raise make_read_error(path, error) from None
        raise UsageError(
            f"{path} cannot be read: its GGUF header is damaged ({error})",
            "nothing was converted.",
            "download it again.",
        ) from None


class _Parser:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def parse(self) -> GGUFHeader:
        if self._read(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, tensors, keys = self._unpack("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        if max(tensors, keys) > MOST_ENTRIES:
            raise ValueError(f"{tensors} tensors and {keys} keys")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._read_text()
            if key in values:
                raise ValueError(f"key {key[:80]!r} stands twice")
            values[key] = self._read_value(self._unpack("<I")[0])
        shapes: dict[str, tuple[int, ...]] = {}
        for _ in range(tensors):
            name = self._read_text()
            if name in shapes:
                raise ValueError(f"tensor {name[:80]!r} stands twice")
            (dimensions,) = self._unpack("<I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"{name[:80]}: {dimensions} dimensions")
            shapes[name] = self._unpack(f"<{dimensions}Q")
            _, offset = self._unpack("<IQ")
            # The smallest quantisation has 1.5 bits a number, in blocks.
            if offset > self._size or math.prod(shapes[name]) > 8 * self._size:
                raise ValueError(f"{name[:80]} lies beyond the end of the file")
        return GGUFHeader(values, shapes)

    def _read(self, count: int) -> bytes:
        found = self._file.read(count)
        if len(found) < count or self._file.tell() > LARGEST_HEADER:
            raise ValueError("it is cut short, or too long")
        return found

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._read(struct.calcsize(layout)))

    def _read_text(self) -> str:
        (length,) = self._unpack("<Q")
        if length > LARGEST_TEXT:
            raise ValueError(f"a text of {length} bytes")
        return self._read(length).decode("utf-8")

    def _read_value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _TEXT:
            return self._read_text()
        if kind != _ARRAY or depth:
            raise ValueError(f"a value of kind {kind}")
        inner, count = self._unpack("<IQ")
        if count > MOST_ENTRIES:
            raise ValueError(f"a list of {count} values")
        found = []
        for place in range(count):
            value = self._read_value(inner, depth + 1)
            if place < KEPT:
                found.append(value)
        return tuple(found) if count <= KEPT else ()
