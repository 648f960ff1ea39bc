r"""Finding the file that a name means, where the name was written on another system.

A list from a Mac may hold the other Unicode form of a name (NFC `é` is one character, NFD is two),
and one from Windows `\` between folders. The name as it is written goes first.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from onellm_dist.shards.storage.paths import StoragePath


def find_named_file(folders: Iterable[Path], name: str) -> Path | None:
    """Find a file by a name relative to one of these folders.

    Args:
        folders: where it is looked for, in this order.
        name: as a list or table has it.

    Returns:
        The file; None if there is none.
    """
    tried = list(folders)
    for wanted in _list_spellings(name):
        for folder in tried:
            if is_file(path := folder / wanted):
                return path
    if name.isascii():
        return None
    for folder in tried:
        found = _find_by_form(folder, name.replace("\\", "/"))
        if found is not None:
            return found
    return None


def describe_missing_file(folders: Sequence[Path], name: str) -> str:
    """Say that a file is missing, where it was looked for, and which file has nearly its name."""
    places = " and ".join(dict.fromkeys(str(f) for f in folders))
    near = next((n for f in folders if (n := _find_near_name(f, name)) is not None), None)
    hint = f"; {near} lies there, and upper and lower case differ" if near else ""
    return f"missing file: {name} (looked for in {places}{hint})"


def is_file(path: StoragePath) -> bool:
    """Check for a file; false for a name that no file can have (too long, a NUL)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def compose(name: str) -> str:
    """Return the NFC form, by which names are compared."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _list_spellings(name: str) -> Iterator[str]:
    yield name
    for spelled in dict.fromkeys((name, name.replace("\\", "/"))):
        for form in ("NFC", "NFD") if not name.isascii() else ("NFC",):
            changed = unicodedata.normalize(form, spelled)
            if changed != name:
                yield changed


def _find_by_form(folder: Path, name: str) -> Path | None:
    """Go down component by component, each in whatever form it is stored."""
    path = folder
    for part in name.split("/"):
        if part in ("", "."):
            continue
        if part == ".." or not isinstance(path, Path):
            return None
        stored = _list_composed(path, _get_stamp(path)).get(compose(part))
        if stored is None:
            return None
        path = path / stored
    return path if is_file(path) else None


def _find_near_name(folder: Path, name: str) -> str | None:
    """Find a file of the same folder whose name differs in case alone."""
    path = folder / name.replace("\\", "/")
    if not isinstance(path, Path):
        return None
    wanted = compose(path.name).casefold()
    names = _list_composed(path.parent, _get_stamp(path.parent))
    return next((stored for n, stored in names.items() if n.casefold() == wanted), None)


def _get_stamp(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except (OSError, ValueError):
        return -1


@lru_cache(maxsize=64)
def _list_composed(folder: Path, stamp: int) -> Mapping[str, str]:
    """Composed name to the name as it is stored, for one state of a folder; empty: no folder."""
    if stamp < 0:
        return {}
    try:
        return {compose(name): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}
