"""Tables whose rows name any number of files, for datasets whose samples list their media.

`images`, `file_names` and the like hold a name or a list of names. The order of a sample's media is
that of the row's columns and of the lists in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.turns import CONVERSATION_KEYS
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.media import make_numbered_parts
from onellm_dist.shards.format.names import make_safe_key, split_file_name
from onellm_dist.shards.sources.base import BadSampleError, Media, RawSample
from onellm_dist.shards.sources.readers.named_files import (
    describe_missing_file,
    find_named_file,
)
from onellm_dist.shards.sources.readers.table_columns import (
    FILE_COLUMNS,
    ROLE_ENDINGS,
    TableColumns,
    find_columns,
)
from onellm_dist.shards.sources.readers.table_rows import TableRow, normalise_column, read_rows
from onellm_dist.shards.sources.readers.table_texts import read_row_texts
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique
from onellm_dist.shards.sources.readers.unread_media import find_unread_column, is_empty

_Columns = Mapping[str, tuple[str, ...]]
"""Column of files to the modalities that its files may have."""


def read_listed_samples(
    table: Path,
    folders: Sequence[Path],
    modalities: tuple[str, ...],
    caption_column: str | None,
    file_column: str | None,
) -> list[RawSample]:
    """Read the samples of a table, each with any number of media.

    Args:
        table: the file.
        folders: where the files are looked for.
        modalities: what samples may have, each read from one file.
        caption_column: the user's column of captions.
        file_column: the user's column of files.

    Raises:
        UsageError: no column names files or holds texts.
    """
    rows = list(read_rows(table))
    names = {name for row in rows for name in row.values}
    caption = normalise_column(caption_column) if caption_column else None
    file = normalise_column(file_column) if file_column else None
    columns = find_columns(names, caption, file)
    found = _find_file_columns(names, modalities, file)
    if not found or (columns.caption not in names and not names & set(CONVERSATION_KEYS)):
        missing = "holds captions or conversations" if found else "names a file"
        raise UsageError(
            f"{table}: no column {missing} (columns: {', '.join(sorted(names)) or 'none'}).",
            "a sample is a text with the media of its row.",
            f"name columns of files {', '.join(f'{m}s' for m in modalities)} or file_names, and of "
            "texts caption, conversations or messages; or use -o file_column=, caption_column=.",
        )
    keys = make_keys_unique(_make_key(row, columns, i) for i, row in enumerate(rows))
    return [
        _make_sample(key, row, columns, found, folders) for key, row in zip(keys, rows, strict=True)
    ]


def _find_file_columns(names: set[str], modalities: tuple[str, ...], file: str | None) -> _Columns:
    found: dict[str, tuple[str, ...]] = {}
    for modality in modalities:
        for column in (f"{modality}s", *(modality + ending for ending in ROLE_ENDINGS)):
            if column in names:
                found[column] = (modality,)
    generic = [c for c in FILE_COLUMNS if c in names and c not in found]
    if file is not None:
        return {**found, file: modalities} if file in names else found
    # `url` says where a file came from, where another column names it
    if generic and not (found and generic[0] == "url"):
        found[generic[0]] = modalities
    return found


def _make_sample(
    key: str, row: TableRow, columns: TableColumns, files: _Columns, folders: Sequence[Path]
) -> RawSample:
    texts = read_row_texts(row, columns, {*files})
    problem = row.problem or texts.problem
    media: list[tuple[str, dict[str, Media]]] = []
    try:
        if problem is None:
            media = list(_find_media(row, files, folders))
    except BadSampleError as error:
        problem = error.what
    parts, listed = make_numbered_parts(media)
    return RawSample(key, row.where, parts, texts.caption, {**texts.meta, "media": listed}, problem)


def _find_media(
    row: TableRow, files: _Columns, folders: Sequence[Path]
) -> Iterator[tuple[str, dict[str, Media]]]:
    """Yield modality, and extension to file, of each medium of a row.

    Raises:
        BadSampleError: a file is missing, remote, of no modality of the column, or in a column that
            is not read.
    """
    has_media = any(not is_empty(row.values.get(column)) for column in files)
    modalities = {name for own in files.values() for name in own}
    unread = find_unread_column(row.values, files, modalities, has_media=has_media)
    if unread is not None:
        raise BadSampleError(f"unread media: the column {unread} names a file, and is not read")
    for column, value in row.values.items():
        if column not in files:
            continue
        for item in value if isinstance(value, list) else [value]:
            if item in (None, ""):
                continue
            yield _find_medium(item, column, files[column], folders)


def _find_medium(
    item: Any, column: str, modalities: tuple[str, ...], folders: Sequence[Path]
) -> tuple[str, dict[str, Media]]:
    if not isinstance(item, str):
        raise BadSampleError(
            f"unreadable row: {column} has a {type(item).__name__}, not a file name"
        )
    name = item.strip().removeprefix("file://")
    if "://" in name:
        raise BadSampleError(
            f"remote file: {name} is a URL; download it first (img2dataset, video2dataset, yt-dlp)"
        )
    path = find_named_file(folders, name)
    if path is None:
        raise BadSampleError(describe_missing_file(folders, name))
    split = split_file_name(path.name)
    extension = split[1] if split else path.suffix.lower().lstrip(".")
    fitting = [(m, own) for m in modalities if (own := _choose_extension(m, extension))]
    if len(fitting) != 1:
        kinds = " or ".join(m for m, _ in fitting) or "none of " + ", ".join(modalities)
        raise BadSampleError(
            f"{'ambiguous' if fitting else 'unknown kind of file'}: {name} in column {column} may "
            f"be {kinds}"
        )
    ((modality, own),) = fitting
    return modality, {own: path}


def _choose_extension(modality: str, extension: str) -> str:
    """The extension of a file as the part of a modality (`npy`: `imu.npy`); empty: it is none."""
    (accepted,) = get_modality(modality).required_parts.values()
    own = (e for e in accepted if e == extension or e.endswith(f".{extension}"))
    return next(own, "")


def _make_key(row: TableRow, columns: TableColumns, number: int) -> str:
    own = row.values.get(columns.key) if columns.key else None
    given = str(own).strip() if isinstance(own, (str, int)) else ""
    return make_safe_key(given) if given else f"row-{number:09d}"
