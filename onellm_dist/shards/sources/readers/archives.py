"""Members of zip archives, read where they lie; also of split archives (`x.z01`, ..., `x.zip`).

Nothing is unpacked or joined. The format is PKWARE's APPNOTE 6.3 with zip64, as Info-ZIP's `zip -s`
writes split archives: offsets count from the start of a volume, and what does not fit continues in
the next one.

This is written by hand because the standard library's zipfile (Python 3.11) reads archives of one
volume only, and reads the complete directory for every member; here a process keeps about 40 bytes
per member.
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
from onellm_dist.common.hidden_files import has_hidden_part
from onellm_dist.shards.sources.base import BadSampleError

_END = struct.Struct("<4s4H2LH")
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED = 0
_DEFLATED = 8
_ENCRYPTED = 1
_CHUNK = 1 << 20
_LARGEST_UNPACKED = 2 << 30
"""Bytes of a deflated member: 2 MB of an archive can promise that much, and more costs a worker."""
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


class ArchiveEntry(NamedTuple):
    """A member, as the archive's directory describes it."""

    name: str
    volume: int
    """Number of the volume, from 0: x.z01 is 0, x.zip the last."""
    offset: int
    """Byte offset of its local header in that volume."""
    packed: int
    """Bytes in the archive."""
    size: int
    """Bytes when unpacked."""
    method: int
    crc: int
    flags: int


@dataclass(frozen=True)
class ArchiveMember:
    """A member: read by byte range, unpacked in memory, checked against its CRC-32."""

    volumes: tuple[Path, ...]
    """The volumes from the one where the member begins to the last."""
    stem: str
    offset: int
    packed: int
    size: int
    method: int
    crc: int
    flags: int = 0

    def read_bytes(self) -> bytes:
        """Read the member's content.

        Raises:
            BadSampleError: the member is cut short, damaged, encrypted, or packed by an unknown
                method.
            OSError: a volume cannot be read.
        """
        where = f"{self.stem} in {self.volumes[-1].name}"
        if self.flags & _ENCRYPTED:
            raise BadSampleError(f"unreadable archive: {where} is encrypted")
        if self.method not in (_STORED, _DEFLATED):
            raise BadSampleError(
                f"unreadable archive: {where} is packed by method {self.method}; "
                f"stored and deflated are supported"
            )
        if self.method == _DEFLATED and self.size > _LARGEST_UNPACKED:
            raise BadSampleError(
                f"too large: {where} would unpack to {self.size:,} bytes; "
                f"the limit is {_LARGEST_UNPACKED:,}"
            )
        head = self._read_span(0, _LOCAL.size)
        if len(head) < _LOCAL.size or head[:4] != b"PK\x03\x04":
            raise BadSampleError(
                f"unreadable archive: no header of {where} at offset {self.offset}"
            )
        name_length, extra_length = _LOCAL.unpack(head)[-2:]
        data = self._read_span(_LOCAL.size, name_length + extra_length + self.packed)
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

    def _read_span(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` after the local header's first byte, across volumes."""
        found, place = b"", self.offset + start
        for volume in self.volumes:
            with volume.open("rb") as file:
                there = volume.stat().st_size
                if place >= there and not found:  # it begins in a later volume
                    place -= there
                    continue
                file.seek(place)
                # A directory may promise any size, and memory is reserved for what is asked for.
                piece = file.read(max(0, min(size - len(found), there - place)))
            found, place = found + piece, 0
            if len(found) == size:
                break
        return found


def list_volumes(archive: Path) -> tuple[Path, ...]:
    """List the volumes of an archive, `archive` (the .zip) last.

    Raises:
        UsageError: the file is not a zip archive or is cut short, or a volume is missing.
    """
    count = _find_directory(archive)[0]
    volumes = tuple(archive.parent / f"{archive.stem}.z{number:02d}" for number in range(1, count))
    for volume in volumes:
        if not volume.is_file():
            raise UsageError(
                f"{volume}: there is no such file; {archive.name} is split into {count} volumes.",
                "members that lie in it cannot be read.",
                "download it and put it beside the others.",
            )
    return (*volumes, archive)


def list_entries(archive: Path) -> Iterator[ArchiveEntry]:
    """List the files of an archive, in the order of its directory; folders are left out.

    Raises:
        UsageError: the file is not a zip archive or is cut short, or a volume is missing.
    """
    _, volume, offset, total = _find_directory(archive)
    rest, buffer = list_volumes(archive)[volume:], b""
    source = _read_from(rest, offset)
    for _ in range(total):
        buffer = _fill_buffer(archive, buffer, source, _ENTRY.size)
        fields = _ENTRY.unpack(buffer[: _ENTRY.size])
        if fields[0] != b"PK\x01\x02":
            raise _archive_error(archive, "its directory is damaged")
        flags, method = fields[3:5]
        crc, packed, size, name_len, extra_len, comment_len, disk = fields[7:14]
        at = fields[16]
        length = _ENTRY.size + name_len + extra_len + comment_len
        buffer = _fill_buffer(archive, buffer, source, length)
        name = buffer[_ENTRY.size : _ENTRY.size + name_len].decode("utf-8", "replace")
        extra = buffer[_ENTRY.size + name_len : length - comment_len]
        size, packed, at, disk = _apply_zip64(extra, size, packed, at, disk)
        buffer = buffer[length:]
        if not name.endswith("/"):
            yield ArchiveEntry(name, disk, at, packed, size, method, crc, flags)


def _read_from(volumes: Sequence[Path], offset: int) -> Iterator[bytes]:
    """Yield the bytes from `offset` of the first volume to the end of the last."""
    for volume in volumes:
        with volume.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                yield chunk
        offset = 0


def _fill_buffer(archive: Path, buffer: bytes, source: Iterator[bytes], length: int) -> bytes:
    while len(buffer) < length:
        more = next(source, None)
        if more is None:
            raise _archive_error(archive, "its directory is cut short")
        buffer += more
    return buffer


def _apply_zip64(
    extra: bytes, size: int, packed: int, offset: int, disk: int
) -> tuple[int, int, int, int]:
    """Replace the values that did not fit by those of the zip64 extra field."""
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


def _find_directory(archive: Path) -> tuple[int, int, int, int]:
    """(number of volumes, volume where the directory begins, its offset there, its entries)."""
    total = archive.stat().st_size
    with archive.open("rb") as file:
        file.seek(max(0, total - (1 << 16) - _END.size - _END64_PLACE.size - _END64.size))
        base = file.tell()
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise _archive_error(archive, "it has no end record")
    _, disk, first, _, count, _, offset, _ = _END.unpack_from(tail, at)
    place = at - _END64_PLACE.size
    if place >= 0 and tail[place : place + 4] == b"PK\x06\x07":
        _, _, end64, _ = _END64_PLACE.unpack_from(tail, place)
        # As a rule it is in the last volume. If it is split off, the 16-bit numbers above are used.
        if (
            base <= end64 <= base + len(tail) - _END64.size
            and tail[end64 - base : end64 - base + 4] == b"PK\x06\x06"
        ):
            _, _, _, _, disk, first, _, count, _, offset = _END64.unpack_from(tail, end64 - base)
    return disk + 1, first, offset, count


def _archive_error(archive: Path, why: str) -> UsageError:
    return UsageError(
        f"{archive} is not a readable zip archive: {why}.",
        "its members cannot be found.",
        "download it again.",
    )


def _hash_stem(stem: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(stem.encode("utf-8", "replace"), digest_size=8).digest(), "little"
    )


class ArchiveIndex:
    """Where the members with certain suffixes lie, by the stem of their name.

    The stem of `a/b/7.flac` is `7`; folders do not matter.

    Args:
        archive: the .zip, the last volume.
        suffixes: the suffixes of media, with the dot, the preferred first.
    """

    def __init__(self, archive: Path, suffixes: Sequence[str]) -> None:
        self.volumes = list_volumes(archive)
        self.suffixes = tuple(suffixes)
        rows = []
        for entry in list_entries(archive):
            name = PurePosixPath(entry.name)
            suffix = name.suffix.lower()
            if suffix in self.suffixes and not has_hidden_part(name):
                place = (entry.offset, entry.packed, entry.size)
                how = (entry.crc, entry.volume, entry.method, entry.flags)
                rows.append((_hash_stem(name.stem), *place, *how, self.suffixes.index(suffix)))
        self.rows: NDArray[np.void] = np.array(rows, _ROW)
        self.rows.sort(order="stem", kind="stable")

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, stem: str) -> tuple[str, ArchiveMember] | None:
        """Find the member of a stem; if it has several suffixes, that of the preferred one.

        Returns:
            Suffix and member; None if there is none.
        """
        wanted = np.uint64(_hash_stem(stem))
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


@cache  # with a bound, a dataset of many archives would parse them again for every sample
def _load_index(archive: Path, size: int, suffixes: tuple[str, ...]) -> ArchiveIndex:
    return ArchiveIndex(archive, suffixes)


def open_archive_index(archive: Path, suffixes: Sequence[str]) -> ArchiveIndex:
    """Open the archive's index, which is made once per process.

    Raises:
        UsageError: the file is not a zip archive or is cut short, or a volume is missing.
    """
    return _load_index(archive, archive.stat().st_size, tuple(suffixes))
