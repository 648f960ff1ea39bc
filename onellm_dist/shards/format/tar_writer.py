"""Write one shard: a WebDataset tar and its index.

The tar equals what `webdataset.TarWriter` (1.0.2) writes, byte for byte, and is written faster.
Nearly all headers have the same form (a short ASCII name), so they are filled in from a template;
the others are made by the standard library's tarfile as PAX, as webdataset does. Content is
gathered into large writes, and hashed on the way.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

from onellm_dist.common.files import get_staged_path, sync
from onellm_dist.shards.format.dataset import ShardInfo
from onellm_dist.shards.format.index import (
    IndexRows,
    PartLocation,
    count_text_bytes,
    pack_index,
    write_index,
)

BLOCK = 512
"""Bytes of a tar header; contents are padded to a multiple of it."""
OWNER = "onellm"
MODE = 0o444
_RECORD = 20 * BLOCK
"""Tars end at a multiple of this (tarfile.RECORDSIZE)."""
_GATHER = 1 << 20
"""Bytes handed to the file and to SHA-256 at once."""
_LARGEST = 8**11
"""Sizes from here on do not fit the octal field of a plain header."""
_ZEROS = bytes(_RECORD)


def make_header(name: str, size: int) -> bytes:
    """Make the tar header of a regular file: time 0, owner `onellm` with id 0, mode 0444.

    PAX headers precede it where the name or the size needs them.
    """
    if size < _LARGEST and len(name) <= tarfile.LENGTH_NAME and name.isascii():
        block = _HEAD + b"%011o\0" % size + _MIDDLE
        block = name.encode("ascii").ljust(tarfile.LENGTH_NAME, b"\0") + block
        # The checksum field counts as spaces; the template has them.
        return block[:148] + b"%06o\0 " % sum(block) + block[156:]
    info = _make_info(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, tarfile.ENCODING, "surrogateescape")


def _make_info(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode = MODE
    info.mtime = 0
    info.uname = OWNER
    info.gname = OWNER
    return info


def _make_template() -> tuple[bytes, bytes]:
    """Make what stands before and behind the size in a header (the checksum field as spaces)."""
    block = _make_info("x").tobuf(tarfile.PAX_FORMAT)
    return block[100:124], block[136:148] + b" " * 8 + block[156:]


_HEAD, _MIDDLE = _make_template()


class ShardWriter:
    """One tar that is being written under a temporary name.

    `close` writes its index, forces both to the disk and renames them.

    Args:
        target: the tar's final path.
        path: its path in the manifest.
        split: its split in the manifest.
        media_of: the modalities of a dataset that lists its media: the index then says which media
            each sample has; None: the dataset does not list them.
    """

    def __init__(
        self, target: Path, *, path: str, split: str, media_of: Collection[str] | None = None
    ) -> None:
        self.target = target
        self.path = path
        self.split = split
        self.samples = 0
        self.content = 0
        """Bytes of all parts so far."""
        self._media_of = media_of
        self._rows = IndexRows(media=None if media_of is None else [])
        self._file = get_staged_path(target).open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._pieces: list[bytes] = []
        self._gathered = 0
        self._offset = 0

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append a sample, its parts sorted by extension.

        The names must be valid: the caller has checked them (`valid_names.check_names`).

        Raises:
            SampleError: the dataset lists its media, and those of the sample cannot be listed.
        """
        if self._media_of is not None and self._rows.media is not None:
            from onellm_dist.shards.format.media import measure_media  # it imports torch

            self._rows.media.append(measure_media(parts, self._media_of))
        start, places = self._offset, {}
        for extension in sorted(parts):
            content = parts[extension]
            size = len(content)
            self._write(make_header(f"{key}.{extension}", size))
            places[extension] = PartLocation(self._offset, size, zlib.crc32(content))
            self._write(content)
            if size % BLOCK:
                self._write(_ZEROS[: BLOCK - size % BLOCK])
            self.content += size
        self._rows.add(key, start, places, count_text_bytes(parts.get("txt"), parts.get("json")))
        self.samples += 1

    def _write(self, data: bytes) -> None:
        self._pieces.append(data)
        self._offset += len(data)
        self._gathered += len(data)
        if self._gathered >= _GATHER:
            self._flush()

    def _flush(self) -> None:
        data = b"".join(self._pieces)
        self._pieces = []
        self._gathered = 0
        self._digest.update(data)
        view = memoryview(data)
        while view:  # an unbuffered write may take less than it is given
            view = view[self._file.write(view) :]

    def close(self) -> ShardInfo:
        """End the tar. Afterwards tar and index are complete under their names."""
        end = self._offset
        self._write(_ZEROS[: 2 * BLOCK])
        self._write(_ZEROS[: -self._offset % _RECORD])
        self._flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = self._digest.hexdigest()
        index = pack_index(
            self._rows,
            tar_name=self.target.name,
            tar_bytes=self._offset,
            tar_sha256=digest,
            end=end,
        )
        write_index(self.target, index)
        get_staged_path(self.target).replace(self.target)
        sync(self.target.parent)
        return ShardInfo(self.path, self.split, self.samples, self._offset, digest)

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        get_staged_path(self.target).unlink(missing_ok=True)
