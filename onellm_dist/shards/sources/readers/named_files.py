r"""Finding the file that a name means, where the name was written on another system.

A list from a Mac may hold the other Unicode form of a name (NFC `é` is one character, NFD is two),
and one from Windows `\` between folders. The name as it is written goes first.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

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
    near = next((found for f in folders if (found := _find_near_file(f, name)) is not None), None)
    hint = f"; {near[0]} lies there, {near[1]}" if near else ""
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
    path = _walk(folder, _split(name), lambda part, names: names.get(compose(part)))
    return path if path is not None and is_file(path) else None


def _find_near_file(folder: Path, name: str) -> tuple[str, str] | None:
    """Find a file whose name may be meant, and say what differs; None: there is none."""
    if not isinstance(folder, Path):
        return None
    plain, parts = unquote(name), _split(name)
    if plain != name and ".." not in plain and is_file(folder / plain):
        return plain, "without the % of web addresses"
    cased = _walk(folder, parts, lambda part, names: names.by_case.get(compose(part).casefold()))
    if cased is not None and is_file(cased):
        return cased.relative_to(folder).as_posix(), "and upper and lower case differ"
    parent = _walk(folder, parts[:-1], lambda part, names: names.get(compose(part)))
    if parent is not None and parts:
        names = _list_names(parent, _get_stamp(parent))
        last = compose(parts[-1])
        stored = names.by_stem.get(last) or names.by_stem.get(PurePosixPath(last).stem)
        if stored is not None and is_file(parent / stored):
            return (parent / stored).relative_to(folder).as_posix(), "with another extension"
    below = [p for p in parts if p != ".."]
    tails = ("/".join(below[i:]) for i in range(len(below)))
    tail = next((t for t in tails if t != name and is_file(folder / t)), None)
    return None if tail is None else (tail, "where its path begins otherwise")


def _split(name: str) -> list[str]:
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _walk(
    folder: Path, parts: Sequence[str], choose: Callable[[str, _StoredNames], str | None]
) -> Path | None:
    """Go down from a folder: `choose` picks the stored name of each part."""
    path = folder
    for part in parts:
        if part == ".." or not isinstance(path, Path):
            return None
        stored = choose(part, _list_names(path, _get_stamp(path)))
        if stored is None:
            return None
        path = path / stored
    return path


class _StoredNames(dict[str, str]):
    """The names in a folder as they are stored, by their composed form."""

    by_case: Mapping[str, str]
    """Stored names by their composed form in the lower case by which Unicode compares."""
    by_stem: Mapping[str, str]
    """Stored names by their composed form without extension."""

    def __init__(self, stored: Iterable[str]) -> None:
        super().__init__({compose(name): name for name in stored})
        self.by_case = {name.casefold(): stored for name, stored in self.items()}
        self.by_stem = {PurePosixPath(name).stem: stored for name, stored in self.items()}


def _get_stamp(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except (OSError, ValueError):
        return -1


@lru_cache(maxsize=64)
def _list_names(folder: Path, stamp: int) -> _StoredNames:
    """The names in a folder, for one state of it; empty: there is no folder."""
    try:
        return _StoredNames(sorted(os.listdir(folder)) if stamp >= 0 else ())
    except OSError:
        return _StoredNames(())
