"""What lies in an input folder, and what is said of the files that a source passes over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from onellm_dist.common.hidden_files import has_hidden_part
from onellm_dist.shards.format.names import is_compressed_tar
from onellm_dist.shards.storage.paths import RemotePath

_SHOWN = 8


@dataclass(frozen=True)
class ListedFiles:
    """The files of a folder, sorted by name, without hidden ones."""

    files: tuple[Path, ...]
    hidden: int
    """Hidden files that were left out."""

    def select(self, suffixes: Collection[str]) -> list[Path]:
        """Return the files with one of these suffixes (lower case, with the dot)."""
        return [p for p in self.files if get_shown_suffix(p.name) in suffixes]

    def select_compressed_tars(self) -> list[Path]:
        """Return the tars that are compressed, by their names."""
        return [p for p in self.files if is_compressed_tar(p.name)]

    def make_notes(self, used: Collection[str]) -> tuple[str, ...]:
        """Say which files are passed over.

        Args:
            used: suffixes that the source reads (`_stats.json` is one, too).
        """
        others = Counter(
            get_shown_suffix(p.name) for p in self.files if not p.name.lower().endswith(tuple(used))
        )
        notes = []
        if others:
            listed = ", ".join(f"{n} x {s}" for s, n in others.most_common(_SHOWN))
            notes.append(f"ignored: {listed}")
        if self.hidden:
            notes.append(f"hidden files skipped: {self.hidden}")
        return tuple(notes)


def list_files(folder: Path, *, recursive: bool = False) -> ListedFiles:
    """List the files of a folder, local or remote.

    Args:
        folder: the folder.
        recursive: whether the files of its subfolders are listed too.
    """
    found, hidden = [], 0
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        # In a store a recursive listing has files alone, and asking costs a request each.
        if not (recursive and isinstance(path, RemotePath)) and not path.is_file():
            continue
        if has_hidden_part(path.relative_to(folder).as_posix()):
            hidden += 1
        else:
            found.append(path)
    return ListedFiles(tuple(found), hidden)


def get_shown_suffix(name: str) -> str:
    """Get the suffix by which a file is counted: `.tar.gz` of `a.tar.gz`, else `.gz`."""
    suffixes = PurePosixPath(name.lower()).suffixes
    if len(suffixes) > 1 and suffixes[-2] in (".tar", ".json", ".jsonl", ".csv", ".tsv"):
        return "".join(suffixes[-2:])
    return suffixes[-1] if suffixes else name
