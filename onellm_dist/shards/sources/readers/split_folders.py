"""Folders that are the splits of a dataset: `train/`, `validation/`, `test/` (imagefolder).

A repository of the Hugging Face hub may have them below `data/`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from onellm_dist.common.hidden_files import is_hidden
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.shards.format.names import split_file_name

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Name of a folder, in lower case, to the split that it holds (the names of Hugging Face's
imagefolder)."""
DATA_FOLDER = "data"
"""Where a repository of the Hub may have its splits."""
_NOTES = frozenset(
    {".txt", ".md", ".rst", ".html", ".pdf", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml"}
    | {".yml", ".toml", ".cfg", ".ini", ".log", ".py", ".pyc", ".ipynb", ".sh", ".c", ".h", ".cpp"}
    | {".cu"}
)
"""Suffixes of programs, notes and results. A folder beside the splits with anything else in it
(archives, pictures in a format that nothing reads) may be a split that cannot be read."""
_NOTE_NAMES = frozenset({"Dockerfile", "LICENSE", "Makefile", "README"})


def find_split_folders(
    root: Path, has_table: Callable[[Path], bool]
) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Find the folders of splits at the top of a folder, or of its folder `data/`.

    Args:
        root: the folder.
        has_table: whether a folder has a table that names samples.

    Returns:
        Split to its folders (`val/` and `validation/` may both be there), in the order train, val,
        test; empty if there is none, or if media lie elsewhere too. And the names of those with
        nothing but programs, notes and results in them, as `eval/` may have, beside others.
    """
    found = _find_at_top(root, has_table)
    if found[0] or not (root / DATA_FOLDER).is_dir():
        return found
    others = (n for n in os.listdir(root) if n != DATA_FOLDER and not is_hidden(n))
    if any(_holds_media(root / n) for n in others):
        return {}, ()
    return _find_at_top(root / DATA_FOLDER, has_table)


def _find_at_top(
    root: Path, has_table: Callable[[Path], bool]
) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    names = sorted(name for name in os.listdir(root) if not is_hidden(name))
    found: dict[str, list[Path]] = {}
    for name in names:
        split = SPLIT_FOLDERS.get(name.lower())
        if split is not None and (root / name).is_dir():
            found.setdefault(split, []).append(root / name)
        elif _holds_media(root / name):
            return {}, ()
    held_out = [folder for split in ("val", "test") for folder in found.get(split, ())]
    left = {f for f in held_out if _holds_notes_alone(f) and not has_table(f)}
    if left == {folder for several in found.values() for folder in several}:
        left = set()
    kept = {
        split: [folder for folder in found.get(split, ()) if folder not in left]
        for split in ("train", "val", "test")
    }
    return (
        {split: several for split, several in kept.items() if several},
        tuple(folder.name for folder in held_out if folder in left),
    )


def _holds_media(path: Path) -> bool:
    """Check whether a path is a medium (by its name), or a folder with one in it."""
    return any(map(_is_medium, _walk(path))) if path.is_dir() else _is_medium(path.name)


def _holds_notes_alone(folder: Path) -> bool:
    return all(
        os.path.splitext(name)[1].lower() in _NOTES or name in _NOTE_NAMES for name in _walk(folder)
    )


def _walk(folder: Path) -> Iterator[str]:
    """List the names of the files below a folder but hidden ones; links are followed."""
    seen = set[str]()
    for path, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(path))
        folders[:] = [
            name
            for name in folders
            if not is_hidden(name) and os.path.realpath(os.path.join(path, name)) not in seen
        ]
        yield from (name for name in names if not is_hidden(name))


def _is_medium(name: str) -> bool:
    split = split_file_name(name)
    return split is not None and split[1] not in TEXT_EXTENSIONS
