"""Writes one shard: a WebDataset tar and its index, byte for byte what `webdataset.TarWriter` (1.0.2) writes, and faster.

Nearly all headers are of one kind (a short ASCII name), so they are filled in from a template; others are made by the standard
library's tarfile as PAX, as webdataset does. Content is gathered into large writes, and hashed as it goes.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from onellm_dist.common.files import staged_path, sync
from onellm_dist.shards.format.dataset import ShardInfo
from onellm_dist.shards.format.index import (
    IndexRows,
    PartLocation,
    count_text_bytes,
    pack_index,
    write_index,
)

BLOCK = 512
OWNER = "onellm"
MODE = 0o444
_RECORD = 20 * BLOCK
"""Tars end at a multiple of this (tarfile.RECORDSIZE)."""
_GATHER = 1 << 20
"""Bytes handed to the file and to SHA-256 at once."""
_LARGEST = 8**11
"""Sizes from here on do not fit a plain header's octal field."""
_ZEROS = bytes(_RECORD)


def header(name: str, size: int) -> bytes:
    """The tar header of a regular file: time 0, owner `onellm` with id 0, mode 0444; with PAX headers before it where needed."""
    if size < _LARGEST and len(name) <= tarfile.LENGTH_NAME and name.isascii():
        block = _HEAD + b"%011o\0" % size + _MIDDLE
        block = name.encode("ascii").ljust(tarfile.LENGTH_NAME, b"\0") + block
        # The checksum field counts as spaces; the template has them.
        return block[:148] + b"%06o\0 " % sum(block) + block[156:]
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uname, info.gname = size, MODE, 0, OWNER, OWNER
    return info.tobuf(tarfile.PAX_FORMAT, tarfile.ENCODING, "surrogateescape")


def _template() -> tuple[bytes, bytes]:
    """What stands between name and size, and behind the size, in a header (checksum field as spaces)."""
    info = tarfile.TarInfo("x")
    info.mode, info.mtime, info.uname, info.gname = MODE, 0, OWNER, OWNER
    block = info.tobuf(tarfile.PAX_FORMAT)
    return block[100:124], block[136:148] + b" " * 8 + block[156:]


_HEAD, _MIDDLE = _template()


class ShardWriter:
    """One tar, written aside; `close` writes its index, syncs both and renames them.

    Args:
        target: the tar's final path.
        path: its path in the manifest.
        split: its split in the manifest.
    """

    def __init__(self, target: Path, *, path: str, split: str) -> None:
        self.target, self.path, self.split = target, path, split
        self.samples = 0
        self.content = 0
        """Bytes of all parts until now."""
        self._rows = IndexRows()
        self._file = staged_path(target).open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._pieces: list[bytes] = []
        self._gathered = 0
        self._offset = 0

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Appends a sample, parts sorted by extension. The names are the caller's care (`writer.check_names`)."""
        start, places = self._offset, {}
        for extension in sorted(parts):
            content = parts[extension]
            size = len(content)
            self._write(header(f"{key}.{extension}", size))
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
        self._pieces, self._gathered = [], 0
        self._digest.update(data)
        view = memoryview(data)
        while view:  # an unbuffered write may take less than it was given
            view = view[self._file.write(view) :]

    def close(self) -> ShardInfo:
        """Ends the tar; afterwards tar and index are whole under their names."""
        end = self._offset
        self._write(_ZEROS[: 2 * BLOCK])
        self._write(_ZEROS[: -self._offset % _RECORD])
        self._flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = self._digest.hexdigest()
        write_index(
            self.target,
            pack_index(
                self._rows,
                tar_name=self.target.name,
                tar_bytes=self._offset,
                tar_sha256=digest,
                end=end,
            ),
        )
        staged_path(self.target).replace(self.target)
        sync(self.target.parent)
        return ShardInfo(self.path, self.split, self.samples, self._offset, digest)

    def abandon(self) -> None:
        """Removes what was written."""
        self._file.close()
        staged_path(self.target).unlink(missing_ok=True)
