"""Reading the structure of a WebDataset tar: names, keys, offsets and checksums, with every fault named by its place."""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.shards.format.index import IndexRows, PartLocation, count_text_bytes

BLOCK = 512
_CHUNK = 1 << 20
# webdataset 1.0.2, tariterators.base_plus_ext: the key runs to the first dot of the base name.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
# webdataset 1.0.2, tar_file_iterator's skip_meta: members under such names are no samples.
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


class TarError(OneLLMError):
    """A tar that cannot be used as a shard.

    Args:
        tar: the file.
        how: what is wrong with it.
        key, offset: where, as far as it is known.
    """

    def __init__(
        self, tar: Path, how: str, key: str | None = None, offset: int | None = None
    ) -> None:
        self.tar, self.how, self.key, self.offset = tar, how, key, offset
        place = "".join(
            [
                f", key {key}" if key is not None else "",
                f", at offset {offset}" if offset is not None else "",
            ]
        )
        super().__init__(
            f"{tar}{place}: {how}.",
            "the shard would lose or mix up samples.",
            "fetch or write the tar again (the tool that writes it may still be running).",
        )

    def __reduce__(self) -> tuple[type[TarError], tuple[Path, str, str | None, int | None]]:  # type: ignore[override]
        return type(self), (self.tar, self.how, self.key, self.offset)


@dataclass
class TarScan:
    """What a tar holds."""

    rows: IndexRows
    bytes: int
    sha256: str
    end: int
    """Offset of the end-of-archive marker."""


def split_name(name: str) -> tuple[str, str] | None:
    """A tar member's (key, lower-cased extension) by WebDataset's rule; None: not part of a sample."""
    if _META.match(name):
        return None
    match = _NAME.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def scan_tar(path: Path) -> TarScan:
    """Reads a whole tar and returns its rows.

    Raises:
        TarError: not a tar, compressed, truncated, a damaged header, a duplicate key or part, a name that is not UTF-8, or
            no sample at all.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                rows, end = _Scanner(path, file).run(tar)
        except tarfile.TarError as error:
            raise _unreadable(path, file, error) from error
        _check_end(path, file, end, rows)
        size = file.seek(0, 2)
    if not rows.keys:
        raise TarError(path, "it holds no sample (no regular file named KEY.EXTENSION)")
    return TarScan(rows, size, sha256_of(path), end)


def salvage_tar(path: Path) -> tuple[IndexRows, str | None]:
    """(the samples of a tar as far as it can be read, why it cannot be read farther; None: it is whole).

    The last one may lack parts, where a damaged header hid them; none behind it are among them.
    """
    try:
        return scan_tar(path).rows, None
    except TarError as error:
        how = error.how
    with path.open("rb") as file:
        scanner = _Scanner(path, file)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                scanner.run(tar)
        except (TarError, tarfile.TarError):
            pass  # what was closed until then is whole
    return scanner.rows, how


class _Scanner:
    """Groups members into samples while going through the tar once."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.rows = path, file, IndexRows()
        self.first_at: dict[str, int] = {}
        self.key: str | None = None
        self.parts: dict[str, PartLocation] = {}
        self.texts: dict[str, bytes] = {}

    def run(self, tar: tarfile.TarFile) -> tuple[IndexRows, int]:
        try:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or every header of a large tar stays in memory
                names = split_name(member.name) if member.isreg() else None
                if names is not None:
                    self.take(member, *names)
        except tarfile.TarError as error:
            raise TarError(
                self.path, f"it is truncated or damaged ({error})", self.key, tar.offset
            ) from error
        self.close_sample()
        return self.rows, tar.offset

    def take(self, member: tarfile.TarInfo, key: str, extension: str) -> None:
        """One part."""
        try:
            key.encode()
            extension.encode()
        except UnicodeEncodeError:
            raise TarError(
                self.path, f"the member name {member.name!a} is not UTF-8", None, member.offset
            ) from None
        if member.issparse():
            raise TarError(
                self.path,
                f"part .{extension} is stored as a sparse file, which has no byte range",
                key,
                member.offset,
            )
        if key != self.key:
            self.close_sample()
            if key in self.first_at:
                raise TarError(
                    self.path,
                    f"duplicate key: it already stands at offset {self.first_at[key]}",
                    key,
                    member.offset,
                )
            self.key, self.first_at[key] = key, member.offset
        elif extension in self.parts:
            raise TarError(
                self.path,
                f"duplicate part .{extension}: the other begins at offset {self.parts[extension].offset}",
                key,
                member.offset,
            )
        self.parts[extension] = self.checksum(member, key, extension)

    def checksum(self, member: tarfile.TarInfo, key: str, extension: str) -> PartLocation:
        self.file.seek(member.offset_data)
        crc, left, kept = 0, member.size, bytearray()
        while left > 0:
            chunk = self.file.read(min(left, _CHUNK))
            if not chunk:
                raise TarError(
                    self.path,
                    f"truncated: part .{extension} has {member.size - left} of its {member.size} bytes",
                    key,
                    member.offset_data,
                )
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            if extension in TEXT_EXTENSIONS:
                kept += chunk
        if extension in TEXT_EXTENSIONS:
            self.texts[extension] = bytes(kept)
        return PartLocation(member.offset_data, member.size, crc)

    def close_sample(self) -> None:
        if self.key is not None:
            length = count_text_bytes(self.texts.get("txt"), self.texts.get("json"))
            self.rows.add(self.key, self.first_at[self.key], self.parts, length)
        self.key, self.parts, self.texts = None, {}, {}


def _unreadable(path: Path, file: BinaryIO, error: tarfile.TarError) -> TarError:
    file.seek(0)
    head = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            return TarError(
                path,
                f"it is compressed ({kind}); samples of a compressed tar cannot be reached by byte range: unpack it first",
            )
    return TarError(path, "it is empty" if not head else f"it is not a tar ({error})", None, 0)


def _check_end(path: Path, file: BinaryIO, end: int, rows: IndexRows) -> None:
    """Python's tarfile (3.11) takes a damaged header, or the file's end without a marker, as the end of the archive."""
    last = rows.keys[-1] if rows.keys else None
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise TarError(path, "truncated: it ends without an end-of-archive marker", last, end)
    if any(block):
        raise TarError(path, f"damaged: no valid header follows the sample {last!r}", last, end)
    while chunk := file.read(_CHUNK):
        if any(chunk):
            raise TarError(
                path,
                "there is data behind the end-of-archive marker (two tars joined?), which tar readers do not see",
                last,
                end,
            )
