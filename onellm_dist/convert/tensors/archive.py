"""The zip archives of torch.save: where the bytes of each entry lie, and their checksums.

Entries are stored, not compressed. Each has a CRC-32, or 0 where the writer left it
out (torch.serialization.set_crc32_options).
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from onellm_dist.common.bounded_pickle import LARGEST_PICKLE
from onellm_dist.common.errors import UsageError
from onellm_dist.convert.tensors.file_kinds import identify_file
from onellm_dist.convert.tensors.lazy import BLOCK, DataFile

MAGIC = b"PK\x03\x04"


def make_read_error(path: Path, reason: object) -> UsageError:
    """The error for a file that cannot be read as a checkpoint.

    Args:
        path: the file.
        reason: an exception, or words; its first line is shown.
    """
    kind = identify_file(path)
    if kind is not None:
        return UsageError(
            f"{path} cannot be read: it is {kind.what}", "nothing was converted.", kind.do
        )
    first = (str(reason).splitlines() or [type(reason).__name__])[0]
    return UsageError(
        f"{path} cannot be read: {first[:300]}",
        "nothing was converted.",
        "download it again; only tensors are read, never pickled code.",
    )


class Archive:
    """The entries of the zip archive, and where their bytes lie in the file."""

    def __init__(self, data: DataFile, start: int, length: int) -> None:
        self.data = data
        self.start = start
        window = _FileWindow(data, start, length)
        try:
            with zipfile.ZipFile(window) as archive:
                infos = archive.infolist()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise zipfile.BadZipFile(str(error)) from None
        described = [i.filename for i in infos if i.filename.rsplit("/", 1)[-1] == "data.pkl"]
        if len(described) != 1:
            raise make_read_error(
                data.path,
                "it has no data.pkl (torch.save before 1.6 wrote another format: save it again)",
            )
        self.root = described[0].removesuffix("data.pkl")
        self.entries = {
            i.filename.removeprefix(self.root): i for i in infos if i.filename.startswith(self.root)
        }
        if len(self.entries) != len([i for i in infos if i.filename.startswith(self.root)]):
            raise make_read_error(data.path, "two entries of the archive have one name")
        if "byteorder" in self.entries and self.read_entry("byteorder") != b"little":
            raise make_read_error(data.path, "its numbers are big-endian")

    def find(self, name: str) -> tuple[int, int]:
        """(offset in the file, length) of an entry's bytes."""
        info = self.entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise make_read_error(self.data.path, f"entry {name} is compressed or encrypted")
        header = bytes(self.data.read_bytes(self.start + info.header_offset, 30).numpy())
        magic, name_length, extra_length = struct.unpack("<4s22xHH", header)
        if magic != MAGIC:
            raise make_read_error(self.data.path, f"entry {name} has no header")
        offset = self.start + info.header_offset + 30 + name_length + extra_length
        if offset + info.file_size > self.data.size:
            raise make_read_error(self.data.path, f"entry {name} goes beyond the end of the file")
        return offset, info.file_size

    def read_entry(self, name: str) -> bytes:
        """The bytes of a small entry."""
        offset, length = self.find(name)
        if length > LARGEST_PICKLE:
            raise make_read_error(self.data.path, f"{name} has {length} bytes")
        content = bytes(self.data.read_bytes(offset, length).numpy())
        crc = self.entries[name].CRC
        if crc and zlib.crc32(content) != crc:
            raise make_damage_error(self.data.path, name)
        return content

    def check(self, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Read all entries and compare their CRC-32.

        Args:
            on_bytes: called with the number of bytes of each block, for progress.

        Raises:
            UsageError: an entry is damaged.
        """
        for name, info in self.entries.items():
            offset, length = self.find(name)
            crc = 0
            for start in range(offset, offset + length if info.CRC else offset, BLOCK):
                count = min(BLOCK, offset + length - start)
                crc = zlib.crc32(self.data.read_bytes(start, count).numpy().data, crc)
                on_bytes(count)
            if crc != info.CRC:
                raise make_damage_error(self.data.path, name)


def make_damage_error(path: Path, what: str) -> UsageError:
    """The error for bytes that are not those that were written.

    Args:
        path: the file.
        what: the part that is damaged, or how that is known.
    """
    return UsageError(
        f"{path} is damaged: {what} has another checksum than when it was written",
        "a single changed bit would become another model.",
        "copy or download the file again.",
    )


class _FileWindow(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, data: DataFile, start: int, length: int) -> None:
        self._data = data
        self._start = start
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise OSError("not a zip archive")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size < 0 else min(size, left)
        found = bytes(self._data.read_bytes(self._start + self._at, size).numpy())
        self._at += size
        return found
