"""Tables of captions that a folder without a single text holds, and that are not read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.shards.format.names import split_file_name
from onellm_dist.shards.sources.readers.folder_tables import is_sample_table, read_column_names
from onellm_dist.shards.sources.readers.table_rows import TABLE_SUFFIXES

_PARQUET = (".parquet", ".arrow")
_SPREADSHEETS = (".xlsx", ".xls", ".ods")
SUFFIXES = (*TABLE_SUFFIXES, *_PARQUET, *_SPREADSHEETS)
"""Suffixes of files that may be tables, in lower case."""


def refuse_lost_tables(root: Path, tables: Iterable[Path]) -> None:
    """Refuse a folder none of whose samples has a text, if a table may hold the captions.

    Args:
        root: the input folder.
        tables: the files below it that may be tables.

    Raises:
        UsageError: one of them names files or cannot be looked into; the message says what to do.
    """
    for table in tables:
        found = _describe(root, table)
        if found is not None:
            raise UsageError(
                f"{root}: no sample has a caption, and {found[0]}.",
                "a sample without text teaches nothing.",
                found[1],
            )


def _describe(root: Path, table: Path) -> tuple[str, str] | None:
    """Say what a table is and what to do; None: it is none of captions."""
    name, suffix = table.relative_to(root).as_posix(), table.suffix.lower()
    if suffix in _PARQUET:
        return (
            f"{name} is a table that this source does not read",
            "onellm shards build parquet IN OUT reads it, with the files that it names.",
        )
    if suffix in _SPREADSHEETS:
        return f"{name} is a spreadsheet", "save it as CSV (UTF-8) in the folder's top level."
    if is_sample_table(table):
        return (
            f"the table {name} does not lie at the top of the folder",
            f"name it: -o captions={name}, or give its folder as IN.",
        )
    try:
        columns = read_column_names(table)
    except OneLLMError as error:
        return f"{name} cannot be read as a table ({error.what.rstrip('.')})", error.do
    media = next((c for c in sorted(columns) if _is_medium(c)), None)
    if media is None:
        return None
    return (
        f"the first line of {name} holds a file, {media}, and not the names of its columns",
        "add a first line such as file,caption to it.",
    )


def _is_medium(name: str) -> bool:
    split = split_file_name(name)
    return split is not None and split[1] not in TEXT_EXTENSIONS
