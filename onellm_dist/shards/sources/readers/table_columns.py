"""What the columns of a table hold: captions, files of a role, conversations, keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onellm_dist.common.turns import CONVERSATION_KEYS
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.format.names import get_modality_parts

CAPTION_COLUMNS = ("caption", "text", "description", "sentence", "title", "label")
FILE_COLUMNS = (
    "file",
    "file_name",
    "filename",
    "file_path",
    "filepath",
    "path",
    "image",
    "img",
    "media",
    "image_path",
    "file_names",
    "url",
)
"""Columns of files of any modality, the most specific first.

A column that is named after a role (`audio`, `depth_image`) says which part it holds."""
KEY_COLUMNS = ("key", "id")
NO_VALUE = frozenset({"NaN", "nan", "NULL", "null", "None", "<NA>", "#N/A", "N/A"})
"""Cells that programs write where they have no value."""
ROLE_ENDINGS = ("", "_file", "_path", "_image", "_file_name", "_filename", "_file_names")


@dataclass(frozen=True)
class TableColumns:
    """What the columns of a table hold."""

    caption: str | None
    """The column of captions."""
    generic: str | None
    """The column of files whose role their extension says."""
    roles: Mapping[str, tuple[tuple[str, ...], ...]]
    """Column of files to the accepted extensions of each role that it may hold."""
    key: str | None
    """The column of keys."""

    @property
    def files(self) -> set[str]:
        """All columns of files."""
        return {*self.roles, *([self.generic] if self.generic else [])}


def find_columns(names: set[str], caption: str | None, file: str | None) -> TableColumns:
    """Find out what the columns of a table hold.

    Args:
        names: normalised names of all columns.
        caption: the user's column of captions.
        file: the user's column of files.
    """
    roles: dict[str, tuple[tuple[str, ...], ...]] = {}
    for modality in all_modalities().values():
        for role, accepted in get_modality_parts(modality).items():
            # A column that is called `timestamps` alone may hold values.
            endings = ROLE_ENDINGS if role in modality.required_parts else ROLE_ENDINGS[1:]
            for column in (role + ending for ending in endings):
                if column in names and column != file and accepted not in roles.get(column, ()):
                    roles[column] = (*roles.get(column, ()), accepted)
    return TableColumns(
        caption if caption is not None else next((c for c in CAPTION_COLUMNS if c in names), None),
        file
        if file is not None
        else next((c for c in FILE_COLUMNS if c in names and c not in roles), None),
        roles,
        next((c for c in KEY_COLUMNS if c in names), None),
    )


def count_known_columns(names: Iterable[str]) -> int:
    """Count the columns that hold a caption, a file, a conversation or a key, by their names.

    Args:
        names: normalised names.
    """
    given = set(names)
    columns = find_columns(given, None, None)
    used = {columns.caption, *columns.files, columns.key} - {None}
    return len(used) + len(given & set(CONVERSATION_KEYS))
