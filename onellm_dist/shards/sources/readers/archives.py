"""Members of zip archives read where they lie, split archives (`x.z01, x.z02, ..., x.zip`) too: nothing is unpacked or joined.

The layout is PKWARE's APPNOTE 6.3 with zip64, as Info-ZIP's `zip -s` writes split archives: offsets count from the start of a volume,
and what does not fit goes on in the next one. The standard library's zipfile reads archives of one volume only (Python 3.11), and
reads the whole directory for every member; here a process keeps about 40 bytes a member.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.base import BadSampleError

_END = struct.Struct("<4s4H2LH")
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 1
_CHUNK = 1 << 20
_ROW = np.dtype(
    [
        ("stem", "<u8"),
        ("offset", "<u8"),
        ("packed", "<u8"),
        ("size", "<u8"),
        ("crc", "<u4"),
        ("volume", "<u2"),
        ("method", "<u2"),
        ("flags", "<u2"),
        ("suffix", "<u2"),
    ]
)


class Entry(NamedTuple):
    """A member, as the archive's directory has it."""

    name: str
    volume: int
    """From 0: x.z01 is 0, x.zip the last."""
    offset: int
    """Of its local header in that volume."""
    packed: int
    size: int
    method: int
    crc: int
    flags: int


@dataclass(frozen=True)
class ArchiveMember:
    """One member: read by byte range, unpacked in memory, checked against its CRC-32."""

    volumes: tuple[Path, ...]
    """From the one where the member begins to the last."""
    stem: str
    offset: int
    packed: int
    size: int
    method: int
    crc: int
    flags: int = 0

    def read_bytes(self) -> bytes:
        """The member's content.

        Raises:
            BadSampleError: cut short, damaged, encrypted, or packed in a way that is not known.
            OSError: a volume cannot be read.
        """
        where = f"{self.stem} in {self.volumes[-1].name}"
        if self.flags & _ENCRYPTED:
            raise BadSampleError(f"unreadable archive: {where} is encrypted")
        if self.method not in (_STORED, _DEFLATED):
            raise BadSampleError(
                f"unreadable archive: {where} is packed by method {self.method}; stored and deflated are read"
            )
        head = self._span(0, _LOCAL.size)
        if len(head) < _LOCAL.size or head[:4] != b"PK\x03\x04":
            raise BadSampleError(
                f"unreadable archive: no header of {where} at offset {self.offset}"
            )
        name_length, extra_length = _LOCAL.unpack(head)[-2:]
        data = self._span(_LOCAL.size, name_length + extra_length + self.packed)
        name, content = data[:name_length], data[name_length + extra_length :]
        if PurePosixPath(name.decode("utf-8", "replace")).stem != self.stem:
            raise BadSampleError(
                f"unreadable archive: another member than {where} lies at offset {self.offset}"
            )
        if len(content) != self.packed:
            raise BadSampleError(
                f"truncated archive: {where} has {len(content)} of {self.packed} bytes"
            )
        if self.method == _DEFLATED:
            try:
                content = zlib.decompressobj(-15).decompress(content, self.size + 1)
            except zlib.error as error:
                raise BadSampleError(f"unreadable archive: {where}: {error}") from error
        if len(content) != self.size or zlib.crc32(content) != self.crc:
            raise BadSampleError(f"unreadable archive: {where} fails its CRC-32")
        return content

    def _span(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` behind the local header's first byte, over the ends of volumes."""
        found, place = b"", self.offset + start
        for volume in self.volumes:
            with volume.open("rb") as file:
                file.seek(place)
                piece = file.read(size - len(found))
                if not piece and not found:
                    place -= volume.stat().st_size  # it begins in a later volume
                    continue
            found, place = found + piece, 0
            if len(found) == size:
                break
        return found


def list_volumes(archive: Path) -> tuple[Path, ...]:
    """All volumes of an archive, `archive` (the .zip) last.

    Raises:
        UsageError: no zip archive, cut short, or a volume is missing.
    """
    count = _directory_place(archive)[0]
    volumes = tuple(archive.parent / f"{archive.stem}.z{number:02d}" for number in range(1, count))
    for volume in volumes:
        if not volume.is_file():
            raise UsageError(
                f"{volume}: there is no such file, and {archive.name} is split into {count} volumes.",
                "members that lie in it cannot be read.",
                "fetch it and put it beside the others.",
            )
    return (*volumes, archive)


def list_entries(archive: Path) -> Iterator[Entry]:
    """The files of an archive, in the order of its directory; folders are left out.

    Raises:
        UsageError: no zip archive, cut short, or a volume is missing.
    """
    _, volume, offset, total = _directory_place(archive)
    rest, buffer = list_volumes(archive)[volume:], b""
    source = _read_on(rest, offset)
    for _ in range(total):
        buffer = _filled(archive, buffer, source, _ENTRY.size)
        fields = _ENTRY.unpack(buffer[: _ENTRY.size])
        if fields[0] != b"PK\x01\x02":
            raise _no_archive(archive, "its directory is damaged")
        (
            _,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            name_len,
            extra_len,
            comment_len,
            disk,
            _,
            _,
            at,
        ) = fields
        length = _ENTRY.size + name_len + extra_len + comment_len
        buffer = _filled(archive, buffer, source, length)
        name = buffer[_ENTRY.size : _ENTRY.size + name_len].decode("utf-8", "replace")
        extra = buffer[_ENTRY.size + name_len : length - comment_len]
        size, packed, at, disk = _large(extra, size, packed, at, disk)
        buffer = buffer[length:]
        if not name.endswith("/"):
            yield Entry(name, disk, at, packed, size, method, crc, flags)


def _read_on(volumes: Sequence[Path], offset: int) -> Iterator[bytes]:
    """The bytes from `offset` of the first volume on."""
    for volume in volumes:
        with volume.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                yield chunk
        offset = 0


def _filled(archive: Path, buffer: bytes, source: Iterator[bytes], length: int) -> bytes:
    while len(buffer) < length:
        more = next(source, None)
        if more is None:
            raise _no_archive(archive, "its directory is cut short")
        buffer += more
    return buffer


def _large(
    extra: bytes, size: int, packed: int, offset: int, disk: int
) -> tuple[int, int, int, int]:
    """The values with those of the zip64 extra field put in, where they did not fit."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            values = extra[place + 4 : place + 4 + length]
            found, at = [], 0
            for value, limit, width in (
                (size, 0xFFFFFFFF, 8),
                (packed, 0xFFFFFFFF, 8),
                (offset, 0xFFFFFFFF, 8),
                (disk, 0xFFFF, 4),
            ):
                if value == limit and at + width <= len(values):
                    found.append(int.from_bytes(values[at : at + width], "little"))
                    at += width
                else:
                    found.append(value)
            return found[0], found[1], found[2], found[3]
        place += 4 + length
    return size, packed, offset, disk


def _directory_place(archive: Path) -> tuple[int, int, int, int]:
    """(volumes, the volume where the directory begins, its offset there, its entries)."""
    total = archive.stat().st_size
    with archive.open("rb") as file:
        file.seek(max(0, total - (1 << 16) - _END.size - _END64_PLACE.size - _END64.size))
        base = file.tell()
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise _no_archive(archive, "it has no end record")
    _, disk, first, _, count, _, offset, _ = _END.unpack_from(tail, at)
    place = at - _END64_PLACE.size
    if place >= 0 and tail[place : place + 4] == b"PK\x06\x07":
        _, _, end64, _ = _END64_PLACE.unpack_from(tail, place)
        # In the last volume as a rule; elsewhere (it may be split off) the 16-bit numbers above would have to do.
        if (
            base <= end64 <= base + len(tail) - _END64.size
            and tail[end64 - base : end64 - base + 4] == b"PK\x06\x06"
        ):
            _, _, _, _, disk, first, _, count, _, offset = _END64.unpack_from(tail, end64 - base)
    return disk + 1, first, offset, count


def _no_archive(archive: Path, why: str) -> UsageError:
    return UsageError(
        f"{archive} is no readable zip archive: {why}.",
        "its members cannot be found.",
        "fetch it again.",
    )


def _hash(stem: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(stem.encode("utf-8", "replace"), digest_size=8).digest(), "little"
    )


class ArchiveIndex:
    """Where the members with certain suffixes lie, by the stem of their name (`a/b/7.flac`: `7`), whatever folder they are in."""

    def __init__(self, archive: Path, suffixes: Sequence[str]) -> None:
        self.volumes, self.suffixes = list_volumes(archive), tuple(suffixes)
        rows = []
        for entry in list_entries(archive):
            name = PurePosixPath(entry.name)
            suffix = name.suffix.lower()
            if suffix in self.suffixes and not name.name.startswith("."):
                where = (
                    entry.offset,
                    entry.packed,
                    entry.size,
                    entry.crc,
                    entry.volume,
                    entry.method,
                    entry.flags,
                )
                rows.append((_hash(name.stem), *where, self.suffixes.index(suffix)))
        self.rows: NDArray[np.void] = np.array(rows, _ROW)
        self.rows.sort(order="stem", kind="stable")

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, stem: str) -> tuple[str, ArchiveMember] | None:
        """(suffix, member) of this stem, of the suffix named first where it has several; None: it is not there."""
        wanted = np.uint64(_hash(stem))
        low, high = (
            int(np.searchsorted(self.rows["stem"], wanted, side)) for side in ("left", "right")
        )
        if low == high:
            return None
        row = min(self.rows[low:high], key=lambda r: int(r["suffix"]))
        where = (
            int(row[field]) for field in ("offset", "packed", "size", "method", "crc", "flags")
        )
        return self.suffixes[int(row["suffix"])], ArchiveMember(
            self.volumes[int(row["volume"]) :], stem, *where
        )


@cache  # a bound would make a set of many archives parse them anew for every sample
def _index(archive: Path, size: int, suffixes: tuple[str, ...]) -> ArchiveIndex:
    return ArchiveIndex(archive, suffixes)


def open_archive_index(archive: Path, suffixes: Sequence[str]) -> ArchiveIndex:
    """The archive's index, made once a process.

    Raises:
        UsageError: no zip archive, cut short, or a volume is missing.
    """
    return _index(archive, archive.stat().st_size, tuple(suffixes))
