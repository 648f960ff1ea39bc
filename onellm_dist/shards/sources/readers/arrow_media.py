"""Media in the cells of parquet and Arrow tables: bytes, `{bytes, path}`, arrays, file names."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from onellm_dist.common.counts import format_count
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.names import get_modality_parts
from onellm_dist.shards.sources.base import BadSampleError, Media
from onellm_dist.shards.sources.readers.named_files import (
    describe_missing_file,
    find_named_file,
)

_MAGIC: Sequence[tuple[bytes, int, str]] = (
    (b"\xff\xd8\xff", 0, "jpg"),
    (b"\x89PNG\r\n\x1a\n", 0, "png"),
    (b"WEBP", 8, "webp"),
    (b"GIF8", 0, "gif"),
    (b"BM", 0, "bmp"),
    (b"II*\0", 0, "tiff"),
    (b"MM\0*", 0, "tiff"),
    (b"WAVE", 8, "wav"),
    (b"AVI ", 8, "avi"),
    (b"fLaC", 0, "flac"),
    (b"OggS", 0, "ogg"),
    (b"ID3", 0, "mp3"),
    (b"\xff\xfb", 0, "mp3"),
    (b"\xff\xf3", 0, "mp3"),
    (b"ftypM4A", 4, "m4a"),
    (b"ftypqt", 4, "mov"),
    (b"ftyp", 4, "mp4"),
    (b"\x1aE\xdf\xa3", 0, "mkv"),
    (b"\x93NUMPY", 0, "npy"),
    (b"ply\n", 0, "ply"),
    (b"ply\r\n", 0, "ply"),
)
"""Bytes, their offset, and the extension of such a file."""
_PICTURES = frozenset({"gif", "bmp", "tiff"})


@dataclass(frozen=True)
class TableMedia:
    """Media that stand in a table."""

    table: Path
    """The file of the table."""
    name: str
    """The name that the table gives it, or its place."""
    data: bytes = field(repr=False)

    def read_bytes(self) -> bytes:
        """Return the bytes."""
        return self.data


def read_listed_items(
    name: str,
    columns: Mapping[str, tuple[str, ...]],
    values: Mapping[str, Any],
    table: Path,
    folders: tuple[Path, ...],
) -> Iterator[dict[str, Media]]:
    """Yield the parts of each medium of a modality; columns of optional parts go with its own.

    Args:
        name: the modality.
        columns: column of media to the extensions that its part accepts.
        values: the row.
        table: its file.
        folders: where files are looked for.

    Raises:
        BadSampleError: a column has another number of parts than there are media, or an item cannot
            be read.
    """
    roles = set(get_modality_parts(get_modality(name)).values())
    own = [(column, accepted) for column, accepted in columns.items() if accepted in roles]
    lists = [list_items(values.get(column)) for column, _ in own]
    for (column, _), items in zip(own, lists, strict=True):
        if items and len(items) != len(lists[0]):
            raise BadSampleError(
                f"unreadable row: {column} has {format_count(len(items), 'item')} for "
                f"{len(lists[0])} of "
                f"{own[0][0]}"
            )
    for number in range(len(lists[0]) if lists else 0):
        yield dict(
            read_item(items[number], accepted, column, table, folders)
            for (column, accepted), items in zip(own, lists, strict=True)
            if items
        )


def list_items(value: Any) -> list[Any]:
    """List the media of a cell: those of a list of them, or the one; empty cells have none."""
    items = value if isinstance(value, list) and not _is_array(value) else [value]
    return [item for item in items if not _is_empty(item)]


def _is_empty(item: Any) -> bool:
    if isinstance(item, Mapping):
        return not item.get("bytes") and not item.get("path")
    return item is None or (isinstance(item, (str, bytes, list)) and not item)


def _is_array(value: list[Any]) -> bool:
    """Check whether a list is one of numbers, at any depth."""
    first: Any = value
    while isinstance(first, list) and first:
        first = first[0]
    return isinstance(first, (int, float)) and not isinstance(first, bool)


def read_item(
    item: Any, accepted: Sequence[str], column: str, table: Path, folders: Sequence[Path]
) -> tuple[str, Media]:
    """Make media of an item of `list_items`.

    Args:
        item: bytes, `{bytes, path}`, an array as nested lists, or the name of a file.
        accepted: extensions of the part, the usual one first.
        column: the column, for messages.
        table: the file of the table.
        folders: where named files are looked for.

    Returns:
        Extension and media.

    Raises:
        BadSampleError: it is none of these, the file is missing, or the part does not accept it.
    """
    name, data = column, item
    if isinstance(item, Mapping):
        name, data = str(item.get("path") or column), item.get("bytes") or item.get("path")
    if isinstance(data, list):
        data = _to_npy(data, column)
    if isinstance(data, str):
        return _find_file(data, accepted, folders)
    if not isinstance(data, bytes):
        raise BadSampleError(f"unreadable row: {column} is a {type(item).__name__}, not media")
    found = sniff_extension(data)
    suffix = PurePosixPath(name).suffix.lower().lstrip(".")
    extension = find_accepted(accepted, found) or find_accepted(accepted, suffix)
    if extension is None and found in _PICTURES:
        extension = find_accepted(accepted, "jpg")  # the decoder goes by the content
    if extension is None:
        shown = f" ({found})" if found else ""
        raise BadSampleError(
            f"unknown kind of file: {name}{shown} is none of {', '.join(accepted)}"
        )
    return extension, TableMedia(table, name, data)


def find_accepted(accepted: Sequence[str], kind: str | None) -> str | None:
    """Find the extension of a part for a kind of file (`depth.png` for `png`); None: none fits."""
    return next((e for e in accepted if kind and (e == kind or e.endswith(f".{kind}"))), None)


def sniff_extension(data: bytes) -> str | None:
    """Find the usual extension of a file by its first bytes; None: unknown."""
    return next((kind for magic, at, kind in _MAGIC if data[at : at + len(magic)] == magic), None)


def _to_npy(values: list[Any], column: str) -> bytes:
    """Make a `.npy` of float32 from nested lists."""
    try:
        array = np.asarray(values, dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadSampleError(f"unreadable row: {column} is not an array: {error}") from error
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _find_file(name: str, accepted: Sequence[str], folders: Sequence[Path]) -> tuple[str, Media]:
    if "://" in name:
        raise BadSampleError(f"remote file: {name} is a URL; download it first (img2dataset)")
    path = find_named_file(folders, name)
    if path is None:
        raise BadSampleError(describe_missing_file(folders, name))
    extension = find_accepted(accepted, path.suffix.lower().lstrip("."))
    if extension is None:
        raise BadSampleError(f"unknown kind of file: {name} is none of {', '.join(accepted)}")
    return extension, path
