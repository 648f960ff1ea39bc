"""The file of the token counts of one shard: a `.npy`, and a checksum behind it.

numpy reads the array and ignores what follows, so a program without the checksum reads the file
too. Files of 0.1.0 have none, and are checked by their shape and values.
"""

from __future__ import annotations

import contextlib
import io
import math
import stat
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import atomic_path
from onellm_dist.shards.format.dataset import ShardInfo

_TRAILER = struct.Struct("<8sI")
"""Magic, and the CRC-32 of all bytes before."""
_MAGIC = b"ONELLMTC"

Counts = NDArray[np.unsignedinteger]
Ints = NDArray[np.int64]


class ShardCounts(NamedTuple):
    """The token counts of a shard's texts."""

    counts: Counts
    """[m, 2] text and supervised tokens of each text, row by row."""
    starts: Ints | None
    """[n + 1] first text of each row; None if every row has one text."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        return self.counts.nbytes + (0 if self.starts is None else self.starts.nbytes)


def load_token_counts(path: Path, shard: ShardInfo) -> ShardCounts:
    """Load the token counts of a shard.

    Raises:
        OneLLMError: the file is missing or damaged, or is that of another shard.
    """
    try:
        counts = _parse(path.read_bytes())
    except Exception as error:  # numpy's parser of headers raises Python's own, of many kinds
        raise OneLLMError(
            f"{path}: {error}",
            f"the token counts of shard {shard.path} cannot be read.",
            "delete the file, if it exists, and restart.",
        ) from None
    if counts.shape == (shard.samples, 2):
        return ShardCounts(counts, None)
    rows = (
        counts[:, 0].astype(np.int64)
        if counts.ndim == 2 and counts.shape[1] == 3
        else np.zeros(0, dtype=np.int64)
    )
    ascending = bool((np.diff(rows) >= 0).all())
    if not ascending or not np.array_equal(np.unique(rows), np.arange(shard.samples)):
        raise OneLLMError(
            f"{path}: its shape is {counts.shape}, not {(shard.samples, 2)}",
            "it does not belong to this shard.",
            "delete it and restart.",
        )
    starts = np.searchsorted(rows, np.arange(shard.samples + 1)).astype(np.int64)
    # A copy: a view would keep the column of rows in memory too.
    return ShardCounts(counts[:, 1:].copy(), starts)


def _parse(data: bytes) -> Counts:
    if data[-_TRAILER.size : -4] == _MAGIC:
        (_, crc32), data = _TRAILER.unpack(data[-_TRAILER.size :]), data[: -_TRAILER.size]
        if zlib.crc32(data) != crc32:
            raise ValueError("it fails its CRC-32: bytes were changed")
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is not a .npy of version 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    # Before anything is allocated for a shape that the file does not hold.
    if dtype.kind != "u" or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"it has {len(data)} bytes and says it holds {shape} {dtype}")
    file.seek(0)
    counts: Counts = np.load(file, allow_pickle=False)
    return counts


def save_token_counts(path: Path, counts: Counts, root: Path | None = None) -> None:
    """Write the token counts of a shard, atomically.

    Args:
        path: the file.
        counts: its array.
        root: folder above it whose permissions it gets, and what is made in between: whoever reads
            a dataset reads its token counts. None: the process's umask decides.

    Raises:
        UsageError: the file cannot be written.
    """
    file = io.BytesIO()
    np.save(file, counts, allow_pickle=False)
    data = file.getvalue()
    try:
        permissions = None if root is None else stat.S_IMODE(root.stat().st_mode) & ~stat.S_ISVTX
        _make_folder(path.parent, permissions)
        with atomic_path(path) as temporary:
            temporary.write_bytes(data + _TRAILER.pack(_MAGIC, zlib.crc32(data)))
            if permissions is not None:
                _set_permissions(temporary, permissions & 0o666)
    except OSError as error:
        raise UsageError(
            f"{path}: the token counts cannot be written: {error.strerror or error}",
            "plans are computed from them.",
            "free some space or make the folder writable; if the dataset is read-only, set "
            "ONELLM_CACHE to a folder that all ranks share.",
        ) from error


def _make_folder(folder: Path, permissions: int | None) -> None:
    if permissions is None:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        _make_folder(folder.parent, permissions)
        try:
            folder.mkdir()
        except FileExistsError:  # another process has made it
            return
        _set_permissions(folder, permissions)


def _set_permissions(path: Path, permissions: int) -> None:
    with contextlib.suppress(OSError):  # not every file system keeps them
        path.chmod(permissions)
