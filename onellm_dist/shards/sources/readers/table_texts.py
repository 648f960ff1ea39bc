"""What a row of a table says in words: its caption, and the values that go to the `.json`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from onellm_dist.common.turns import find_conversation
from onellm_dist.shards.sources.readers.table_columns import NO_VALUE, TableColumns
from onellm_dist.shards.sources.readers.table_rows import TableRow


class RowTexts(NamedTuple):
    """The texts of a row."""

    caption: str | None
    meta: dict[str, Any]
    problem: str | None
    """Why the row's caption cannot be used."""


def read_row_texts(
    row: TableRow, columns: TableColumns, files: Collection[str] | None = None
) -> RowTexts:
    """Read the texts of a row.

    Args:
        row: the row.
        columns: what the columns hold.
        files: the columns of files; default: those of `columns`.
    """
    own = columns.files if files is None else files
    used = {*own, columns.caption, columns.key}
    meta = {k: v for k, v in row.values.items() if k not in used and v not in (None, "")}
    text = row.values.get(columns.caption) if columns.caption else None
    problem = None
    if text is not None and not isinstance(text, str):
        problem = f"caption is not text: a {type(text).__name__}"
    elif isinstance(text, str) and text.strip() in NO_VALUE:
        problem = f"no caption: the cell is {text.strip()}, which stands for no value"
    has_turns = find_conversation(meta) is not None
    caption = text if isinstance(text, str) and (text.strip() or not has_turns) else None
    return RowTexts(caption, meta, problem)
