"""The manifest of a checkpoint of our runs, checked before anything is taken from it.

`train/checkpoint/folder.py` describes it; conversion reads it without importing the trainer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onellm_dist.common.checksums import is_intact, make_checksum_error
from onellm_dist.common.errors import UsageError
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST

VERSIONS = (1, 2)
"""Versions of the manifest that can be read; version 2 added checksums."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None if there is none that can be read."""
    try:
        manifest = json.loads((folder / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(manifest, dict) and {"parameters", "files", "version"} <= set(manifest)
    return manifest if known and isinstance(manifest["parameters"], dict) else None


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Check that a manifest is what was written, and of a version and form that is known.

    Raises:
        UsageError: it is damaged, or of another version.
    """
    if not is_intact(manifest):
        raise make_checksum_error(folder / CHECKPOINT_MANIFEST)
    if manifest["version"] not in VERSIONS:
        raise UsageError(
            f"{folder}: version {str(manifest['version'])[:40]}",
            f"this program reads versions {', '.join(map(str, VERSIONS))}.",
            "convert it with the program that wrote it.",
        )
    if fault := _find_fault(manifest):
        raise UsageError(
            f"{folder / CHECKPOINT_MANIFEST} is damaged: {fault}",
            "weights would be taken from wrong places.",
            "give another checkpoint of the run.",
        )


def _find_fault(manifest: dict[str, Any]) -> str:
    """What has another form in a manifest than it is written with; "" if nothing."""
    files, sums = manifest["files"], manifest.get("sha256", {})
    if not isinstance(files, dict) or not all(
        Path(name).name == name and _is_size(size) for name, size in files.items()
    ):
        return "files are not names and sizes"
    if not isinstance(sums, dict) or (
        manifest["version"] >= 2 and (sums.keys() != files.keys() or not all(map(_is_text, sums)))
    ):
        return "sha256 has other files"
    for name, entry in manifest["parameters"].items():
        if not isinstance(entry, dict):
            return f"{name} is not described"
        shape, pieces = entry.get("shape"), entry.get("pieces")
        if not isinstance(shape, list) or not all(map(_is_size, shape)):
            return f"the shape of {name}"
        if not isinstance(pieces, list) or not all(
            isinstance(p, list)
            and len(p) == 3
            and _is_size(p[0])
            and _is_size(p[1])
            and p[2] in files
            for p in pieces
        ):
            return f"the pieces of {name}"
    model = manifest.get("model", {})
    if not isinstance(model, dict) or not _is_size(manifest.get("seed", 0)):
        return "model or seed"
    copied = model.get("init_from_image") or []
    keys = ("path", "preset", "span_positions")
    texts = (*map(model.get, keys), *(copied if isinstance(copied, list) else [0]))
    return "" if all(text is None or _is_text(text) for text in texts) else "model"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
