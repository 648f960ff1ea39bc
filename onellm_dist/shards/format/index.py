"""The index beside each tar (`x.tar.index`): where every part of every sample lies.

With it, one sample is one byte-range read. The index is a columnar binary file that is mapped into
memory and never parsed; `docs/reference/shards.md` describes it byte by byte. Shapes: n samples
and P parts of one shard.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shlex
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.media_size import SampleMedium
from onellm_dist.common.turns import parse_conversations
from onellm_dist.shards.format.index_checks import IndexFaultError, check_columns, parse_header
from onellm_dist.shards.format.media_columns import (
    MediaFaultError,
    make_media_columns,
    open_media_columns,
)
from onellm_dist.shards.storage.paths import StoragePath

MAGIC = b"ONELLMIX"
VERSION = 1
SUFFIX = ".index"
"""The index of `x.tar` is `x.tar.index`."""
_ALIGN = 64
"""Columns start at multiples of this many bytes."""
_FIXED = struct.Struct("<8sIIII")
"""Magic, version, bytes of the header, CRC-32 of the header, CRC-32 of the columns."""


class PartLocation(NamedTuple):
    """Where the bytes of one part lie in the tar."""

    offset: int
    """First byte of the part's content, from the start of the tar."""
    size: int
    """Bytes of the part's content."""
    crc32: int
    """zlib's CRC-32 of the part's content."""


@dataclass
class IndexRows:
    """The rows of one shard's index while it is made, in the order of the tar."""

    keys: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Offset of each sample's first tar header."""
    parts: list[dict[str, PartLocation]] = field(default_factory=list)
    """Extension to location, one mapping a sample."""
    text_bytes: list[int] = field(default_factory=list)
    """UTF-8 bytes of each sample's text."""
    media: list[Sequence[SampleMedium]] | None = None
    """The media of each sample; None: the index does not list media."""

    def add(self, key: str, start: int, parts: dict[str, PartLocation], text_bytes: int) -> None:
        """Append a sample."""
        self.keys.append(key)
        self.starts.append(start)
        self.parts.append(parts)
        self.text_bytes.append(text_bytes)


def count_text_bytes(text: bytes | None, meta: bytes | None) -> int:
    """Count the UTF-8 bytes of a sample's text.

    The text is the `.txt`, else the longest caption or the conversation of the `.json`, else
    nothing. The number is an estimate for planning until a tokenizer has counted the tokens. A
    `.json` that cannot be read, or whose text is not text (half a surrogate pair), counts 0 here;
    whoever reads the sample gets an error.
    """
    if text is not None:
        return len(text)
    try:
        return _count_json_text_bytes(json.loads(meta)) if meta is not None else 0
    except (ValueError, RecursionError):
        return 0


def _count_json_text_bytes(value: Any) -> int:
    if not isinstance(value, dict):
        return 0
    caption = value.get("caption", value.get("captions"))
    if isinstance(caption, (str, list)):
        captions = [caption] if isinstance(caption, str) else caption
        return max((len(one.encode()) for one in captions if isinstance(one, str)), default=0)
    # Here, for it imports torch, which readers of an index do not need.
    from onellm_dist.modalities import all_modalities

    texts = parse_conversations(value, all_modalities())
    return sum(len(turn.text.encode()) for turns in texts for turn in turns)


@overload
def get_index_path(tar: Path) -> Path: ...
@overload
def get_index_path(tar: StoragePath) -> StoragePath: ...
def get_index_path(tar: StoragePath) -> StoragePath:
    """Return `x.tar.index` for `x.tar`, local or remote."""
    return tar.with_name(tar.name + SUFFIX)


def pack_index(
    rows: IndexRows, *, tar_name: str, tar_bytes: int, tar_sha256: str, end: int
) -> bytes:
    """Make the bytes of an index file.

    Args:
        rows: the samples in the order of the tar.
        tar_name: base name of the tar.
        tar_bytes: size of the tar file.
        tar_sha256: hex digest of the tar file.
        end: offset of the tar's end-of-archive marker, which follows the last part.
    """
    extensions = sorted({e for parts in rows.parts for e in parts})
    body = bytearray()
    places = {}
    columns = _make_columns(rows, extensions, end)
    media: dict[str, Any] = {}
    if rows.media is not None:
        more, media["media"] = make_media_columns(rows.media)
        columns |= more
    for name, column in columns.items():
        places[name] = {"dtype": column.dtype.str, "count": len(column), "offset": len(body)}
        body += column.tobytes()
        body += bytes(-len(body) % _ALIGN)
    header = {
        "tar": {"name": tar_name, "bytes": tar_bytes, "sha256": tar_sha256},
        "samples": len(rows.keys),
        "extensions": extensions,
        "columns": places,
        "body_bytes": len(body),
        **media,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_FIXED.size + len(text)) % _ALIGN)
    fixed = _FIXED.pack(MAGIC, VERSION, len(text), zlib.crc32(text), zlib.crc32(body))
    return fixed + text + bytes(body)


def _make_columns(rows: IndexRows, extensions: Sequence[str], end: int) -> dict[str, NDArray[Any]]:
    """Make the columns of the file, in its order."""
    number = {e: i for i, e in enumerate(extensions)}
    keys = [k.encode() for k in rows.keys]
    flat = [
        (number[e], *location)
        for parts in rows.parts
        for e, location in sorted(parts.items(), key=lambda item: item[1].offset)
    ]
    table = np.array(flat, dtype=np.uint64).reshape(-1, 4)
    return {
        "sample_start": np.array([*rows.starts, end], "<u8"),
        "first_part": _sum_before([len(p) for p in rows.parts]),
        "part_offset": table[:, 1].astype("<u8"),
        "part_size": table[:, 2].astype("<u8"),
        "part_crc32": table[:, 3].astype("<u4"),
        "part_extension": table[:, 0].astype("<u2"),
        "text_bytes": np.array(rows.text_bytes, "<u8"),
        "key_start": _sum_before([len(k) for k in keys]),
        "keys": np.frombuffer(b"".join(keys), "u1"),
    }


def _sum_before(lengths: Sequence[int]) -> NDArray[np.uint64]:
    """[n+1] the sum of all earlier lengths, and the total at the end."""
    sums = np.cumsum(np.array(lengths, np.uint64), dtype=np.uint64)
    return np.concatenate([np.zeros(1, np.uint64), sums]).astype("<u8")


class ShardIndex:
    """The index of one shard, mapped into memory.

    Rows are 0 .. samples - 1 in the order of the tar.

    Args:
        path: the index file.
        check: whether to check the columns (their CRC-32, and `index_checks.check_columns`), which
            reads the whole file; False for a file that this process has checked before.

    Raises:
        OneLLMError: the file is not an index, has another version, is damaged, or has values that
            no tar can have.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, *, check: bool = True) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _FIXED.size:
                raise _make_error(path, f"it has {size} bytes, fewer than the header of an index")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, length, header_crc32, body_crc32 = _FIXED.unpack_from(self._map)
        if magic != MAGIC:
            raise _make_error(path, f"it does not start with the bytes {MAGIC.decode()}")
        if version != VERSION:
            raise _make_error(path, f"its version is {version}, this program reads {VERSION}")
        body = _FIXED.size + length
        text = self._map[_FIXED.size : body]
        if zlib.crc32(text) != header_crc32:
            raise _make_error(path, "its header fails its CRC-32")
        try:
            header = parse_header(text)
            if size != body + header.body_bytes:
                expected = body + header.body_bytes
                raise IndexFaultError(f"it has {size} bytes, its header says {expected}")
            if check and zlib.crc32(memoryview(self._map)[body:]) != body_crc32:
                raise IndexFaultError("its columns fail their CRC-32: bytes were changed")
            self._columns = {
                name: np.frombuffer(self._map, place.dtype, place.length, body + place.offset)
                for name, place in header.columns.items()
            }
            if check:
                check_columns(self._columns, header)
            self.media = open_media_columns(self._columns, header.media, header.samples)
            """The media of the samples; None: the index does not list them."""
        except (IndexFaultError, MediaFaultError) as error:
            raise _make_error(path, str(error)) from error
        self.samples = header.samples
        self.extensions = header.extensions
        self.tar_name = header.tar_name
        self.tar_bytes = header.tar_bytes
        self.tar_sha256 = header.tar_sha256

    def __len__(self) -> int:
        """The number of samples."""
        return self.samples

    def _check_row(self, row: int) -> int:
        if not 0 <= row < self.samples:
            raise IndexError(f"row {row} of {self.path}, which has {self.samples} samples")
        return row

    def key(self, row: int) -> str:
        """Return the sample's key."""
        starts = self._columns["key_start"]
        start, end = int(starts[self._check_row(row)]), int(starts[row + 1])
        return self._columns["keys"][start:end].tobytes().decode()

    def keys(self) -> list[str]:
        """Return all keys, in the order of the tar."""
        blob, starts = self._columns["keys"].tobytes(), self._columns["key_start"].tolist()
        return [blob[a:b].decode() for a, b in itertools.pairwise(starts)]

    def parts(self, row: int) -> dict[str, PartLocation]:
        """Return extension to location of the sample's parts, in the order of the tar."""
        c = self._columns
        first, last = c["first_part"][self._check_row(row) : row + 2].tolist()
        return {
            self.extensions[e]: PartLocation(o, s, crc)
            for e, o, s, crc in zip(
                c["part_extension"][first:last].tolist(),
                c["part_offset"][first:last].tolist(),
                c["part_size"][first:last].tolist(),
                c["part_crc32"][first:last].tolist(),
                strict=True,
            )
        }

    def extension_sets(self) -> dict[frozenset[str], tuple[int, int]]:
        """Map each set of extensions to (how many samples have it, the first such row)."""
        c = self._columns
        counts = np.diff(c["first_part"])
        width = int(counts[0]) if self.samples else 0
        if width and (counts == width).all():
            table = c["part_extension"].reshape(self.samples, width)
            if (table == table[0]).all():  # nearly every shard: all samples have the same parts
                return {frozenset(self.extensions[e] for e in table[0].tolist()): (self.samples, 0)}
        found: dict[frozenset[str], tuple[int, int]] = {}
        for row in range(self.samples):
            extensions = frozenset(self.parts(row))
            count, first = found.get(extensions, (0, row))
            found[extensions] = (count + 1, first)
        return found

    def rows(self) -> IndexRows:
        """Return all rows, to make an index of them."""
        rows = IndexRows(media=[] if self.media is not None else None)
        for row in range(self.samples):
            rows.add(self.key(row), self.span(row)[0], self.parts(row), self.text_bytes(row))
            if self.media is not None and rows.media is not None:
                rows.media.append(self.media.get(row))
        return rows

    def text_bytes(self, row: int) -> int:
        """Return the UTF-8 bytes of the sample's text (see `count_text_bytes`)."""
        return int(self._columns["text_bytes"][self._check_row(row)])

    def all_text_bytes(self) -> NDArray[np.uint64]:
        """Return `text_bytes` of every row, [n]: a read-only view of the file."""
        return self._columns["text_bytes"]

    def span(self, row: int) -> tuple[int, int]:
        """Return (start, end) of the sample in the tar, headers included.

        These are also the numbers of Energon's `.tar.idx`.
        """
        start, end = self._columns["sample_start"][self._check_row(row) : row + 2].tolist()
        return start, end

    def sample_starts(self) -> NDArray[np.uint64]:
        """Return where each sample's first header lies, then the end, [n+1]: Energon's `.tar.idx`.

        The array is a read-only view of the file.
        """
        return self._columns["sample_start"]


def _make_error(path: Path, how: str) -> OneLLMError:
    return OneLLMError(
        f"{path} is not a usable shard index: {how}.",
        "samples are found through the index, so nothing of this shard can be read.",
        "make the index again (the tar is only read): "
        f"onellm shards index {shlex.quote(str(path).removesuffix(SUFFIX))}",
    )


def write_index(tar: Path, data: bytes) -> Path:
    """Write the bytes of an index beside its tar, atomically, and return the path."""
    target = get_index_path(tar)
    write_atomic(target, data)
    return target
