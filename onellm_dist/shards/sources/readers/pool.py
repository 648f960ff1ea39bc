"""Media that are named by an id alone: finding `ID.flac` in the folders and zips of a user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.hidden_files import has_hidden_part
from onellm_dist.shards.sources.base import Media
from onellm_dist.shards.sources.readers.archives import list_volumes, open_archive_index


@dataclass(frozen=True)
class MediaPool:
    """Folders and archives that may hold media, relative to the input, sorted."""

    folders: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()

    def to_json(self) -> dict[str, list[str]]:
        """Convert to JSON, for an input split's description."""
        return {"folders": list(self.folders), "archives": list(self.archives)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MediaPool:
        """Convert from the result of `to_json`."""
        return cls(tuple(value["folders"]), tuple(value["archives"]))

    def filter_by_name(self, name: str) -> MediaPool:
        """Keep what has `name` in its path, in upper or lower case."""
        word = name.lower()
        return MediaPool(
            tuple(f for f in self.folders if word in f.lower()),
            tuple(a for a in self.archives if word in a.lower()),
        )

    def __bool__(self) -> bool:
        return bool(self.folders or self.archives)


def find_pool(inputs: Path, suffixes: Sequence[str], folder: str | None = None) -> MediaPool:
    """Find every folder that holds a file with one of the suffixes, and every zip archive.

    Args:
        inputs: the input folder.
        suffixes: of media, with the dot.
        folder: search this folder alone, relative to `inputs`.

    Raises:
        UsageError: an archive cannot be read, or a volume of it is missing.
    """
    folders, archives = set[str](), set[str]()
    for path in (inputs if folder is None else inputs / folder).rglob("*.*"):
        suffix = path.suffix.lower()
        if has_hidden_part(path.relative_to(inputs).as_posix()):
            continue
        if suffix in suffixes:
            folders.add(path.parent.relative_to(inputs).as_posix())
        elif suffix == ".zip":
            archives.add(path.relative_to(inputs).as_posix())
    for archive in archives:
        list_volumes(inputs / archive)
    return MediaPool(tuple(sorted(folders)), tuple(sorted(archives)))


def find_media(
    inputs: Path, pool: MediaPool, stems: Sequence[str], suffixes: Sequence[str]
) -> tuple[str, Media] | None:
    """Find the first of these stems: files before archives, suffixes in their order.

    This takes about 40 bytes of memory per member of the pool's archives, once per process.

    Returns:
        The suffix and the media; None if no stem is found.
    """
    for stem in stems:
        for suffix in suffixes:
            for folder in pool.folders:
                path = inputs / folder / f"{stem}{suffix}"
                if path.is_file():
                    return suffix, path
        for archive in pool.archives:
            found = open_archive_index(inputs / archive, suffixes).find(stem)
            if found is not None:
                return found
    return None
