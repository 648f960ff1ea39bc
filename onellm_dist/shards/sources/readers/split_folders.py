"""Folders that are the splits of a dataset: `train/`, `validation/`, `test/` (imagefolder)."""

from __future__ import annotations

import os
from pathlib import Path

from onellm_dist.common.hidden_files import is_hidden
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
}
"""Name of a folder, in lower case, to the split that it holds (the names of Hugging Face's
imagefolder)."""


def find_split_folders(root: Path) -> dict[str, Path]:
    """Find the folders of splits at the top of a folder.

    Returns:
        Split to folder, in the order train, val, test; empty if there is none, if two have the same
        split, or if media lie elsewhere too.
    """
    names = sorted(name for name in os.listdir(root) if not is_hidden(name))
    found: dict[str, Path] = {}
    for name in names:
        split = SPLIT_FOLDERS.get(name.lower())
        if split is None or not (root / name).is_dir():
            if _holds_media(root / name):
                return {}
        elif split in found:
            return {}
        else:
            found[split] = root / name
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _holds_media(path: Path) -> bool:
    """Check whether a path is a file with a known extension, or a folder with one in it."""
    if not path.is_dir():
        return split_file_name(path.name) is not None
    return any(
        split_file_name(name) is not None and not is_hidden(name)
        for _, _, names in os.walk(path)
        for name in names
    )
