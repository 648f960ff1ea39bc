"""Which files nobody put there on purpose: the one rule for folders, stores and archives.

A name is hidden if it begins with a dot (`._cat.jpg` and `.DS_Store` of macOS,
`.ipynb_checkpoints`), or is one of the folders and files that systems leave beside people's own.
"""

from __future__ import annotations

from pathlib import PurePosixPath

LEFT_BY_SYSTEMS = frozenset(
    {
        "__macosx",  # in zips that macOS makes
        "@eadir",  # thumbnails of Synology's file server
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "desktop.ini",
    }
)
"""In lower case."""


def is_hidden(name: str) -> bool:
    """Check the name of one file or folder, without the folders above it."""
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def has_hidden_part(path: PurePosixPath | str) -> bool:
    """Check every component of a path relative to an input or an archive (`.` and `..` are none).

    Args:
        path: the path, with slashes.
    """
    return any(part not in (".", "..") and is_hidden(part) for part in PurePosixPath(path).parts)
