"""Read the structure of a WebDataset tar: names, keys, offsets and checksums.

Every fault is reported with its place: tar, key, offset.
"""

from __future__ import annotations

import tarfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import sha256_file
from onellm_dist.common.hidden_files import has_hidden_part
from onellm_dist.shards.format.index import IndexRows, PartLocation, count_text_bytes
from onellm_dist.shards.format.valid_names import find_stored_key_fault, split_name

BLOCK = 512
"""Bytes of a tar header; contents are padded to a multiple of it."""
_CHUNK = 1 << 20
_LONGEST_HEADER = 1 << 20
"""Bytes of a long name or of PAX records."""
_LONGEST_JSON = 1 << 26
"""Bytes of a `.json` up to which its text is measured; a longer one counts as without text."""
TAR_FAULTS = (tarfile.TarError, ValueError, OverflowError, EOFError)
"""What Python's tarfile raises for damaged headers (3.11: also numbers that are not numbers)."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


class TarError(OneLLMError):
    """A tar that cannot be used as a shard.

    Args:
        tar: the file.
        how: what is wrong with it.
        key: the sample at fault, if known.
        offset: the byte at fault, if known.
    """

    def __init__(
        self, tar: Path, how: str, key: str | None = None, offset: int | None = None
    ) -> None:
        self.tar = tar
        self.how = how
        self.key = key
        self.offset = offset
        where = f", key {key if key.isprintable() else repr(key)}" if key is not None else ""
        where += f", at offset {offset}" if offset is not None else ""
        super().__init__(
            f"{tar}{where}: {how}.",
            "the shard would lose or mix up samples.",
            "fetch or write the tar again (the tool that writes it may still be running).",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the arguments, so that worker processes can raise it."""
        return type(self), (self.tar, self.how, self.key, self.offset)


@dataclass
class TarScan:
    """What a tar holds."""

    rows: IndexRows
    bytes: int
    """Size of the file."""
    sha256: str
    """Hex digest of the file."""
    end: int
    """Offset of the end-of-archive marker."""
    hidden: int = 0
    """Files that were skipped because a part of their path begins with a dot."""
    links: int = 0
    """Hard and symbolic links that were skipped, although their names are those of parts."""


class HeaderReads:
    """A file as tarfile reads it: headers, long names and PAX records, but no contents.

    tarfile asks for as many bytes as a header says (a long name of 8 GB), and memory is reserved
    for them before the file is found to have fewer.

    Args:
        file: the file of a tar.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes.

        Raises:
            tarfile.ReadError: it is more than any header has.
        """
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header says that {size} bytes of names follow it")
        return self._file.read(size)


def scan_tar(path: Path, *, any_key: bool = False) -> TarScan:
    """Read a whole tar and return its rows.

    Args:
        path: the tar.
        any_key: whether keys are accepted that readers may skip or take for another.

    Raises:
        TarError: the file is not a tar, is compressed or truncated, has a damaged header, a key or
            part twice or a name that is not UTF-8, or holds no sample; or such a key.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            with open_tar_headers(file) as tar:
                scanner = _TarScanner(path, file, any_key=any_key)
                rows, end = scanner.run(tar)
        except TarError:
            raise
        except TAR_FAULTS as error:
            raise _make_unreadable_error(path, file, error) from error
        _check_end(path, file, end, rows)
        size = file.seek(0, 2)
    if not rows.keys:
        raise TarError(path, "it holds no sample (no regular file named KEY.EXTENSION)")
    return TarScan(rows, size, sha256_file(path), end, scanner.hidden, scanner.links)


def salvage_tar(path: Path) -> tuple[IndexRows, str | None]:
    """Read the samples of a tar as far as it can be read, whatever their keys are.

    Returns:
        The samples, and why the tar cannot be read farther (None: it is intact). The last sample
        may lack parts if a damaged header hid them; no sample behind it is included.
    """
    try:
        return scan_tar(path, any_key=True).rows, None
    except TarError as error:
        how = error.how
    with path.open("rb") as file:
        scanner = _TarScanner(path, file, any_key=True)
        # The samples that were closed before the error are intact.
        with (
            suppress(TarError, *TAR_FAULTS),
            open_tar_headers(file) as tar,
        ):
            scanner.run(tar)
    return scanner.rows, how


def open_tar_headers(file: BinaryIO) -> tarfile.TarFile:
    """Open a tar for reading its headers; its contents are read from `file` itself.

    Raises:
        Any of TAR_FAULTS: it is not a tar.
    """
    return tarfile.open(fileobj=cast("BinaryIO", HeaderReads(file)), mode="r:")


class _TarScanner:
    """Groups the members of a tar into samples, in one pass."""

    def __init__(self, path: Path, file: BinaryIO, *, any_key: bool) -> None:
        self.any_key = any_key
        self.path = path
        self.file = file
        self.rows = IndexRows()
        self.first_at: dict[str, int] = {}
        self.key: str | None = None
        self.parts: dict[str, PartLocation] = {}
        self.json: bytes | None = None
        self.hidden = 0
        self.links = 0

    def run(self, tar: tarfile.TarFile) -> tuple[IndexRows, int]:
        """Read all members; return the rows and the offset behind the last one."""
        try:
            for member in tar:
                # Otherwise every header of a large tar stays in memory.
                tar.members = []  # type: ignore[attr-defined]  # typeshed does not list it
                if member.size < 0 or tar.offset <= member.offset:
                    how = f"damaged: a header gives the size {member.size}"
                    raise TarError(self.path, how, self.key, member.offset)
                names = split_name(member.name) if member.isreg() else None
                if names is not None:
                    self.add_part(member, *names)
                elif member.isreg():
                    self.hidden += has_hidden_part(member.name)
                elif member.islnk() or member.issym():
                    self.links += split_name(member.name) is not None
        except TAR_FAULTS as error:
            how = f"it is truncated or damaged ({error})"
            raise TarError(self.path, how, self.key, tar.offset) from error
        self.close_sample()
        return self.rows, tar.offset

    def add_part(self, member: tarfile.TarInfo, key: str, extension: str) -> None:
        """Add one part to the open sample, or open the next sample with it."""
        self.check_member(member, key, extension)
        if key != self.key:
            self.close_sample()
            if key in self.first_at:
                how = f"duplicate key: its first sample starts at offset {self.first_at[key]}"
                raise TarError(self.path, how, key, member.offset)
            self.key = key
            self.first_at[key] = member.offset
        elif extension in self.parts:
            offset = self.parts[extension].offset
            how = f"duplicate part .{extension}: the other begins at offset {offset}"
            raise TarError(self.path, how, key, member.offset)
        self.parts[extension] = self.read_part(member, key, extension)

    def check_member(self, member: tarfile.TarInfo, key: str, extension: str) -> None:
        """Refuse a member that no index can describe."""
        try:
            key.encode()
            extension.encode()
        except UnicodeEncodeError:
            how = f"the member name {member.name!a:.300} is not UTF-8"
            raise TarError(self.path, how, None, member.offset) from None
        fault = None if self.any_key else find_stored_key_fault(key)
        if fault is not None:
            how = f"a key that readers would skip or take for another: {fault}"
            raise TarError(self.path, how, key, member.offset)
        if member.issparse():
            how = f"part .{extension} is stored as a sparse file, which has no byte range"
            raise TarError(self.path, how, key, member.offset)

    def read_part(self, member: tarfile.TarInfo, key: str, extension: str) -> PartLocation:
        """Read a part's content for its CRC-32, and keep it if it is JSON."""
        self.file.seek(member.offset_data)
        crc, left, kept = 0, member.size, bytearray()
        is_kept = extension == "json" and member.size <= _LONGEST_JSON
        while left > 0:
            chunk = self.file.read(min(left, _CHUNK))
            if not chunk:
                read = member.size - left
                how = f"truncated: part .{extension} has {read} of its {member.size} bytes"
                raise TarError(self.path, how, key, member.offset_data)
            crc = zlib.crc32(chunk, crc)
            left -= len(chunk)
            if is_kept:
                kept += chunk
        if is_kept:
            self.json = bytes(kept)
        return PartLocation(member.offset_data, member.size, crc)

    def close_sample(self) -> None:
        """Append the open sample to the rows."""
        if self.key is not None:
            caption = self.parts.get("txt")
            text_bytes = caption.size if caption else count_text_bytes(None, self.json)
            self.rows.add(self.key, self.first_at[self.key], self.parts, text_bytes)
        self.key = None
        self.parts = {}
        self.json = None


def find_compression(path: Path) -> str | None:
    """Return how a file is compressed, by its first bytes; None: it is not."""
    with path.open("rb") as file:
        return _get_compression(file.read(8))


def _get_compression(head: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def _make_unreadable_error(path: Path, file: BinaryIO, error: Exception) -> TarError:
    file.seek(0)
    head = file.read(8)
    name = _get_compression(head)
    if name is not None:
        return TarError(
            path,
            f"it is compressed ({name}); samples of a compressed tar cannot be reached by "
            "byte range: unpack it first",
        )
    return TarError(path, "it is empty" if not head else f"it is not a tar ({error})", None, 0)


def _check_end(path: Path, file: BinaryIO, end: int, rows: IndexRows) -> None:
    """Check what follows the last member.

    Python's tarfile (3.11) takes a damaged header, or the end of a file without a marker, as the
    end of the archive.
    """
    last = rows.keys[-1] if rows.keys else None
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise TarError(path, "truncated: it ends without an end-of-archive marker", last, end)
    if any(block):
        raise TarError(path, f"damaged: no valid header follows the sample {last!r}", last, end)
    while chunk := file.read(_CHUNK):
        if any(chunk):
            how = (
                "data follows the end-of-archive marker (two tars joined?), "
                "and tar readers do not see it"
            )
            raise TarError(path, how, last, end)
