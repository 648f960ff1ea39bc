"""Folders that are the splits of a dataset: `train/`, `validation/`, `test/` (imagefolder).

A repository of the Hugging Face hub may have them below `data/`.
"""

from __future__ import annotations

import os
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
_DATA = "data"


def find_split_folders(root: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Find the folders of splits at the top of a folder, or of its folder `data/`.

    Returns:
        Split to its folders (`val/` and `validation/` may both be there), in the order train, val,
        test; empty if there is none, or if media lie elsewhere too. And the names of those that
        hold no media, beside others that do: `eval/` may hold programs.
    """
    found = _find_at_top(root)
    if found[0] or not (root / _DATA).is_dir():
        return found
    others = (n for n in os.listdir(root) if n != _DATA and not is_hidden(n))
    return ({}, ()) if any(_holds_media(root / n) for n in others) else _find_at_top(root / _DATA)


def _find_at_top(root: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    names = sorted(name for name in os.listdir(root) if not is_hidden(name))
    found: dict[str, list[Path]] = {}
    for name in names:
        split = SPLIT_FOLDERS.get(name.lower())
        if split is not None and (root / name).is_dir():
            found.setdefault(split, []).append(root / name)
        elif _holds_media(root / name):
            return {}, ()
    used = {folder for several in found.values() for folder in several if _holds_media(folder)}
    left = tuple(f.name for several in found.values() for f in several if used and f not in used)
    kept = {
        split: [folder for folder in found.get(split, ()) if not used or folder in used]
        for split in ("train", "val", "test")
    }
    return {split: several for split, several in kept.items() if several}, left


def _holds_media(path: Path) -> bool:
    """Check whether a path is a medium (by its name), or a folder with one in it."""
    if not path.is_dir():
        return _is_medium(path.name)
    return any(
        _is_medium(name) and not is_hidden(name) for _, _, names in os.walk(path) for name in names
    )


def _is_medium(name: str) -> bool:
    split = split_file_name(name)
    return split is not None and split[1] not in TEXT_EXTENSIONS
