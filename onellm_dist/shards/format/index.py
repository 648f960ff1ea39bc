"""The index beside each tar (`x.tar.index`): where every part of every sample lies, so that one sample is one byte-range read.

A columnar binary file that is mapped into memory and never parsed; `shards/README.md` has it byte by byte. Shapes: n
samples and P parts of one shard.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.common.turns import parse_turns

if TYPE_CHECKING:
    from onellm_dist.modalities.base import Part
    from onellm_dist.shards.format.dataset import Dataset, ShardInfo

MAGIC = b"ONELLMIX"
VERSION = 1
SUFFIX = ".index"
"""The index of `x.tar` is `x.tar.index`."""
_ALIGN = 64
_FIXED = struct.Struct("<8sIIII")
"""Magic, version, header bytes, the header's CRC-32, the columns' CRC-32."""


class PartLocation(NamedTuple):
    """Where one part's bytes lie in the tar."""

    offset: int
    """First byte of the part's content, from the start of the tar."""
    size: int
    """Bytes."""
    crc32: int
    """zlib's CRC-32 of the content."""


@dataclass
class IndexRows:
    """The rows of one shard's index while it is made, in the order of the tar."""

    keys: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Offset of each sample's first tar header."""
    parts: list[dict[str, PartLocation]] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)

    def add(self, key: str, start: int, parts: dict[str, PartLocation], text_bytes: int) -> None:
        """One more sample."""
        self.keys.append(key)
        self.starts.append(start)
        self.parts.append(parts)
        self.text_bytes.append(text_bytes)


def count_text_bytes(text: bytes | None, meta: bytes | None) -> int:
    """UTF-8 bytes of a sample's text: its `.txt`, else the (longest) caption or the conversation in its `.json`, else 0.

    An estimate for planning before a tokenizer has measured the text; a `.json` that cannot be read, or whose text is none (half a
    surrogate pair), counts 0 here and is an error for whoever reads the sample.
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
    return sum(len(turn.text.encode()) for turn in parse_turns(value.get("conversations")))


def get_index_path(tar: Path) -> Path:
    """`x.tar` -> `x.tar.index`."""
    return tar.with_name(tar.name + SUFFIX)


def pack_index(
    rows: IndexRows, *, tar_name: str, tar_bytes: int, tar_sha256: str, end: int
) -> bytes:
    """The index file's bytes.

    Args:
        rows: the samples in the order of the tar.
        tar_name: base name of the tar.
        tar_bytes: size of the tar file.
        tar_sha256: hex digest of the tar file.
        end: offset of the tar's end-of-archive marker (behind the last part).
    """
    extensions = sorted({e for parts in rows.parts for e in parts})
    number = {e: i for i, e in enumerate(extensions)}
    keys = [k.encode() for k in rows.keys]
    flat = [
        (number[e], *place)
        for parts in rows.parts
        for e, place in sorted(parts.items(), key=lambda item: item[1].offset)
    ]
    table = np.array(flat, dtype=np.uint64).reshape(-1, 4)

    def ends(lengths: Sequence[int]) -> NDArray[np.uint64]:
        return np.concatenate(
            [np.zeros(1, np.uint64), np.cumsum(np.array(lengths, np.uint64), dtype=np.uint64)]
        )

    columns: dict[str, NDArray[Any]] = {
        "sample_start": np.array([*rows.starts, end], "<u8"),
        "first_part": ends([len(p) for p in rows.parts]).astype("<u8"),
        "part_offset": table[:, 1].astype("<u8"),
        "part_size": table[:, 2].astype("<u8"),
        "part_crc32": table[:, 3].astype("<u4"),
        "part_extension": table[:, 0].astype("<u2"),
        "text_bytes": np.array(rows.text_bytes, "<u8"),
        "key_start": ends([len(k) for k in keys]).astype("<u8"),
        "keys": np.frombuffer(b"".join(keys), "u1"),
    }
    body, places = bytearray(), {}
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
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_FIXED.size + len(text)) % _ALIGN)
    return (
        _FIXED.pack(MAGIC, VERSION, len(text), zlib.crc32(text), zlib.crc32(body))
        + text
        + bytes(body)
    )


class ShardIndex:
    """One shard's index, mapped into memory. Rows are 0 .. samples - 1 in the order of the tar.

    Raises:
        OneLLMError: the file is no index, of another version, or shorter than it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _FIXED.size:
                raise _bad_index(path, f"it has {size} bytes, fewer than an index's header")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, length, header_crc32, self._body_crc32 = _FIXED.unpack_from(self._map)
        if magic != MAGIC:
            raise _bad_index(path, f"it does not start with the bytes {MAGIC.decode()}")
        if version != VERSION:
            raise _bad_index(path, f"its version is {version}, this program reads {VERSION}")
        self._body = _FIXED.size + length
        text = self._map[_FIXED.size : self._body]
        if zlib.crc32(text) != header_crc32:
            raise _bad_index(path, "its header fails its CRC-32")
        self._read_header(json.loads(text), size)

    def _read_header(self, header: Mapping[str, Any], size: int) -> None:
        self.samples: int = header["samples"]
        self.extensions: tuple[str, ...] = tuple(header["extensions"])
        self.tar_name: str = header["tar"]["name"]
        self.tar_bytes: int = header["tar"]["bytes"]
        self.tar_sha256: str = header["tar"]["sha256"]
        if size != self._body + header["body_bytes"]:
            raise _bad_index(
                self.path,
                f"it has {size} bytes where its header says {self._body + header['body_bytes']}",
            )
        self._columns = {
            name: np.frombuffer(
                self._map, dtype=c["dtype"], count=c["count"], offset=self._body + c["offset"]
            )
            for name, c in header["columns"].items()
        }

    def __len__(self) -> int:
        return self.samples

    def _row(self, row: int) -> int:
        if not 0 <= row < self.samples:
            raise IndexError(f"row {row} of {self.path}, which has {self.samples} samples")
        return row

    def key(self, row: int) -> str:
        """The sample's key."""
        starts = self._columns["key_start"]
        return (
            self._columns["keys"][int(starts[self._row(row)]) : int(starts[row + 1])]
            .tobytes()
            .decode()
        )

    def keys(self) -> list[str]:
        """All keys, in order."""
        blob, starts = self._columns["keys"].tobytes(), self._columns["key_start"].tolist()
        return [blob[a:b].decode() for a, b in itertools.pairwise(starts)]

    def parts(self, row: int) -> dict[str, PartLocation]:
        """Extension to place, in the order of the tar."""
        c = self._columns
        first, last = c["first_part"][self._row(row) : row + 2].tolist()
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

    def kinds(self) -> dict[frozenset[str], tuple[int, int]]:
        """The sets of extensions that samples have -> (how many have it, the first such row)."""
        c = self._columns
        counts = np.diff(c["first_part"])
        width = int(counts[0]) if self.samples else 0
        if width and (counts == width).all():
            table = c["part_extension"].reshape(self.samples, width)
            if (table == table[0]).all():  # nearly every shard: all samples alike
                return {frozenset(self.extensions[e] for e in table[0].tolist()): (self.samples, 0)}
        found: dict[frozenset[str], tuple[int, int]] = {}
        for row in range(self.samples):
            kind = frozenset(self.parts(row))
            count, first = found.get(kind, (0, row))
            found[kind] = (count + 1, first)
        return found

    def text_bytes(self, row: int) -> int:
        """UTF-8 bytes of the sample's text (see `count_text_bytes`)."""
        return int(self._columns["text_bytes"][self._row(row)])

    def all_text_bytes(self) -> NDArray[np.uint64]:
        """[n] `text_bytes` of every row, a read-only view of the file."""
        return self._columns["text_bytes"]

    def span(self, row: int) -> tuple[int, int]:
        """(start, end) of the sample in the tar, headers included; these are also the numbers of Energon's `.tar.idx`."""
        start, end = self._columns["sample_start"][self._row(row) : row + 2].tolist()
        return start, end

    def sample_starts(self) -> NDArray[np.uint64]:
        """[n+1] where each sample's first header lies, then the end, a read-only view of the file: Energon's `.tar.idx`."""
        return self._columns["sample_start"]

    def body_is_whole(self) -> bool:
        """The columns' bytes have the CRC-32 that the header gives (reads the whole file: for `verify`)."""
        return zlib.crc32(memoryview(self._map)[self._body :]) == self._body_crc32


def _bad_index(path: Path, how: str) -> OneLLMError:
    return OneLLMError(
        f"{path} is no usable shard index: {how}.",
        "samples are found through the index, so nothing of this shard can be read.",
        f"make it again: onellm shards index {path.name.removesuffix(SUFFIX)}",
    )


def read_parts(
    dataset: Dataset, shard: ShardInfo, row: int, extensions: Collection[str] | None = None
) -> dict[str, Part]:
    """One sample's parts, by one byte-range read, each checked against its CRC-32.

    Args:
        dataset: an open dataset.
        shard: one of its shards.
        row: row in the shard's index.
        extensions: only these; ones that the sample does not have are left out. None: all.

    Raises:
        SampleError: the tar cannot be read there or has other bytes than the index says; dataset, shard, key, part and
            offset are named. Where the operating system failed, its OSError is the `__cause__` (a retry may help).
    """
    return read_span(dataset, shard, row, get_sample_span(dataset, shard, row, extensions))


def read_span(dataset: Dataset, shard: ShardInfo, row: int, span: SampleSpan) -> dict[str, Part]:
    """`read_parts` of a sample whose place is known already; raises the same."""
    if not span.parts:
        return {}
    try:
        data = dataset.read_tar(shard, span.start, span.end)
    except OSError as error:
        raise SampleError(
            f"dataset {dataset.name}, shard {shard.path}, key {dataset.index(shard).key(row)}, offset {span.start}: "
            f"{error.strerror or error}.",
            "the sample cannot be read.",
            "check that the file is there and readable; a passing fault of a network disk goes away by itself.",
        ) from error
    return extract_parts(dataset, shard, row, span, data)


class SampleSpan(NamedTuple):
    """The byte range that holds some parts of a sample."""

    parts: dict[str, PartLocation]
    start: int
    end: int


def get_sample_span(
    dataset: Dataset, shard: ShardInfo, row: int, extensions: Collection[str] | None = None
) -> SampleSpan:
    """Where a sample's parts with these extensions lie (all, if None); the span is empty where it has none of them."""
    return get_parts_span(dataset.index(shard).parts(row), extensions)


def get_parts_span(
    there: Mapping[str, PartLocation], extensions: Collection[str] | None = None
) -> SampleSpan:
    """`get_sample_span` for a sample's parts, as `ShardIndex.parts` gives them."""
    parts = {e: place for e, place in there.items() if extensions is None or e in extensions}
    start = min((place.offset for place in parts.values()), default=0)
    return SampleSpan(
        parts, start, max((place.offset + place.size for place in parts.values()), default=0)
    )


def extract_parts(
    dataset: Dataset, shard: ShardInfo, row: int, span: SampleSpan, data: bytes
) -> dict[str, Part]:
    """The parts in a span's bytes, each checked against its CRC-32.

    Raises:
        SampleError: bytes are missing or other than the index says.
    """
    from onellm_dist.modalities.base import Part  # here: reading an index alone needs no torch

    found = {}
    for extension, (offset, size, crc32) in span.parts.items():
        part = data[offset - span.start : offset - span.start + size]
        if len(part) != size or zlib.crc32(part) != crc32:
            how = (
                f"only {len(part)} of its {size} bytes are there"
                if len(part) != size
                else "its bytes fail their CRC-32"
            )
            raise SampleError(
                f"dataset {dataset.name}, shard {shard.path}, key {dataset.index(shard).key(row)}, part .{extension} at offset {offset}: "
                f"{how}.",
                "the tar was damaged or changed after it was indexed.",
                f"find all such places: onellm shards verify {dataset.location}",
            )
        found[extension] = Part(extension, part)
    return found


def read_range(path: Path | str, start: int, end: int) -> bytes:
    """Bytes start .. end - 1 of a file; fewer only where it ends before."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file (one pread stops at 2 GiB on Linux)."""
    pieces: list[bytes] = []
    while size > 0:
        piece = os.pread(descriptor, size, offset)
        if not piece:
            break
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def write_index(tar: Path, data: bytes) -> Path:
    """Puts an index's bytes beside its tar: aside, synced, renamed."""
    from onellm_dist.common.files import write_atomic

    target = get_index_path(tar)
    write_atomic(target, data)
    return target


def index_tar(path: Path) -> Path:
    """Indexes an existing WebDataset tar; the tar is only read. Returns the path of the index.

    Raises:
        OneLLMError: not a tar, truncated, damaged, compressed, or with a duplicate key or part; names tar, key and
            offset. No index is written then, and an older one stays as it was.
    """
    from onellm_dist.shards.format.tars import scan_tar

    scan = scan_tar(path)
    return write_index(
        path,
        pack_index(
            scan.rows,
            tar_name=path.name,
            tar_bytes=scan.bytes,
            tar_sha256=scan.sha256,
            end=scan.end,
        ),
    )


def try_index_tar(path: Path) -> OneLLMError | None:
    """`index_tar` for many tars: returns the error instead of raising it. (Here, so that worker processes need no torch.)"""
    try:
        index_tar(path)
    except OneLLMError as error:
        return error
    except OSError as error:
        return OneLLMError(
            f"{error.filename or path}: {error.strerror or error}.",
            "the tar is not indexed.",
            "check the disk and the rights; the index goes beside the tar.",
        )
    return None
