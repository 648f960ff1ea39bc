"""Checksums of a checkpoint's files: SHA-256 that were recorded, CRC-32 inside torch.save's zips.

They are compared while the files are hashed for the record, so that nothing is read for them alone
where a conversion runs; `verify` reads the files once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from onellm_dist.common.checksums import check_small_files, make_checksum_error, read_sums
from onellm_dist.common.files import sha256_file
from onellm_dist.convert.checkpoint import ArchiveRange, OpenedCheckpoint
from onellm_dist.convert.tensors.archive import MAGIC, Archive
from onellm_dist.convert.tensors.lazy import DataFile

OnBytes = Callable[[int], None]


def attach_checksums(opened: OpenedCheckpoint) -> OpenedCheckpoint:
    """Add what is recorded about the files of a checkpoint, and check the small ones now.

    Raises:
        UsageError: a record or a small file is damaged.
    """
    sums = dict(opened.checksums)
    for folder in dict.fromkeys(path.parent for path in opened.files):
        check_small_files(folder)
        recorded = read_sums(folder)
        sums |= {
            path: recorded[path.name]
            for path in opened.files
            if path.parent == folder and path.name in recorded and path not in sums
        }
    whole = tuple(ArchiveRange(path) for path in opened.files if _is_archive(path))
    ranges = opened.archives or whole
    return replace(opened, checksums=sums, archives=ranges)


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def hash_file(opened: OpenedCheckpoint, path: Path, on_bytes: OnBytes) -> str:
    """SHA-256 of one of a checkpoint's files.

    Raises:
        UsageError: it is not the recorded one.
    """
    digest = sha256_file(path, on_bytes=on_bytes)
    if opened.checksums.get(path, digest) != digest:
        raise make_checksum_error(path)
    return digest


def check_archives(ranges: Sequence[ArchiveRange]) -> None:
    """Compare the CRC-32 inside archives of torch.save.

    Raises:
        UsageError: an entry is damaged.
    """
    for place in ranges:
        data = DataFile(place.path)
        length = data.size - place.offset if place.length is None else place.length
        Archive(data, place.offset, length).check()


def check_integrity(opened: OpenedCheckpoint) -> None:
    """Read all files of a checkpoint that have checksums, and compare them.

    Raises:
        UsageError: a file is damaged.
    """
    for path in opened.checksums:
        hash_file(opened, path, lambda count: None)
    check_archives(opened.archives)
