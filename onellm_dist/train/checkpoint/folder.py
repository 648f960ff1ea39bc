"""The folder of a checkpoint: its format, its name, and how many checkpoints stay.

Checkpoints hold the trainable state and are elastic: written by ranges, and read by ranges at any
number of ranks and by any engine. A checkpoint is a folder `step-00000100` (100 steps are done; the
step of index 100 comes next):

    rank-00000.safetensors   what rank 0 held: `<parameter>:<start>:<key>` -> [length] fp32, key one
                             of `master` and the optimizer's state keys (`exp_avg`, `exp_avg_sq`)
    rank-00001.safetensors   ...
    manifest.json            version, steps_done, optimizer_steps, optimizer (name and state keys),
                             when it was written (seconds since 1970), what the run adds, every
                             file's size and SHA-256 (since version 2), every parameter's shape and
                             pieces, a checksum of all this (`content_sha256`)

It is written as `.step-00000100.partial`, synced file by file, and renamed when it is complete
(writer.py). Frozen weights are not in it: they come from `model.path` or `model.preset` again
(source.py). Checkpoints of 0.1.0 have `step` instead of `steps_done`, and name no optimizer.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from onellm_dist.common.checksums import is_intact
from onellm_dist.common.files import restore_folder
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST, CHECKPOINT_PREFIX
from onellm_dist.train.checkpoint.files import FileRecord

VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 had no checksums."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a checkpoint.

    Returns:
        None if the checkpoint is not complete (its manifest is missing, damaged or of an unknown
        version, lacks the checksum of a file, or one of its files is missing or cut short);
        otherwise the manifest.
    """
    try:
        manifest = json.loads((folder / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        complete = (
            manifest["version"] in READABLE_VERSIONS
            and is_intact(manifest)
            and (manifest["version"] == 1 or files.keys() == manifest["sha256"].keys())
            and all(_is_file_name(name) for name in files)
            and all((folder / n).stat().st_size == size for n, size in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if complete else None


def _is_file_name(name: str) -> bool:
    """Check that a name of the manifest is one of a file in the checkpoint's own folder."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def get_steps_done(manifest: dict[str, Any]) -> int:
    """Number of steps that a checkpoint's manifest records; 0.1.0 called it `step`."""
    return int(manifest["steps_done"] if "steps_done" in manifest else manifest.get("step", 0))


def get_file_records(folder: Path, manifest: dict[str, Any]) -> list[tuple[Path, FileRecord]]:
    """The files of a checkpoint as its manifest records them; none if it has no checksums."""
    digests = manifest.get("sha256", {})
    return [
        (folder / name, FileRecord(size, digests[name]))
        for name, size in manifest["files"].items()
        if name in digests
    ]


def make_checkpoint_name(steps_done: int) -> str:
    """Folder name of the checkpoint after this number of steps."""
    return f"{CHECKPOINT_PREFIX}{steps_done:08d}"


def parse_name(folder: Path) -> int:
    """Number of steps done, by a checkpoint's folder name."""
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Every folder that is named like a checkpoint, the oldest first."""
    return sorted(
        (
            folder
            for folder in checkpoints.glob(f"{CHECKPOINT_PREFIX}*")
            if folder.name.removeprefix(CHECKPOINT_PREFIX).isdigit()
        ),
        key=parse_name,
    )


def make_tensor_name(parameter: str, start: int, key: str) -> str:
    """Name of a range of a parameter in a checkpoint's files."""
    return f"{parameter}:{start}:{key}"


def prune(
    checkpoints: Path,
    keep: int,
    keep_every: int | None = None,
    keep_every_hours: float | None = None,
) -> None:
    """Remove all but the newest `keep` complete checkpoints, and what unfinished writes left.

    A checkpoint that is cut short, as far as manifest and sizes show, is not counted, and is
    removed if it is older than those that stay. One that only has wrong checksums is moved to
    `before-.../` by whoever finds that out (a start, a rollback).

    Args:
        checkpoints: the folder of all checkpoints.
        keep: how many of the newest complete ones stay.
        keep_every: checkpoints whose number of steps is a multiple of this stay for ever.
        keep_every_hours: the first complete checkpoint stays for ever, and then one whenever this
            many hours lie between it and the last that stayed for this reason.
    """
    found = list_checkpoints(checkpoints)
    newest = list(islice((f for f in reversed(found) if read_manifest(f) is not None), keep))
    oldest = parse_name(newest[-1]) if newest else 0
    permanent = select_permanent(found, keep_every, keep_every_hours)
    for folder in found:
        if parse_name(folder) < oldest and folder not in permanent:
            shutil.rmtree(folder, ignore_errors=True)
    _remove_partial(checkpoints)


def select_permanent(
    found: Sequence[Path], keep_every: int | None, keep_every_hours: float | None
) -> set[Path]:
    """Which checkpoints stay for ever.

    Args:
        found: checkpoints, the oldest first.
        keep_every: see `prune`.
        keep_every_hours: see `prune`.
    """
    permanent = {
        folder
        for folder in found
        if keep_every and parse_name(folder) and parse_name(folder) % keep_every == 0
    }
    if keep_every_hours is not None:
        permanent |= _select_by_hours(found, keep_every_hours)
    return permanent


def _select_by_hours(found: Sequence[Path], hours: float) -> set[Path]:
    """Which checkpoints stay by the time of their writing; a state before the first step does not.

    Args:
        found: checkpoints, the oldest first.
        hours: least time between two that stay.
    """
    kept = set[Path]()
    last = -math.inf
    for folder in found:
        manifest = folder / CHECKPOINT_MANIFEST
        written = _read_time(folder, manifest.stat().st_mtime) if manifest.exists() else None
        if written is not None and parse_name(folder) and written - last >= 3600 * hours:
            kept.add(folder)
            last = written
    return kept


@cache
def _read_time(folder: Path, modified: float) -> float | None:
    """When a complete checkpoint was written; `modified` if its manifest does not say.

    Each manifest is read once per process: manifests are long.
    """
    manifest = read_manifest(folder)
    return None if manifest is None else float(manifest.get("written", modified))


def restore_checkpoints(checkpoints: Path) -> None:
    """Restore checkpoints that a killed start was replacing: they would not be found otherwise."""
    for backup in checkpoints.glob(f".{CHECKPOINT_PREFIX}*.before"):
        restore_folder(backup.with_name(backup.name[1:].removesuffix(".before")))


def recover_checkpoints(checkpoints: Path) -> None:
    """Restore checkpoints that a killed start was replacing; remove unfinished ones."""
    restore_checkpoints(checkpoints)
    for backup in checkpoints.glob(f".{CHECKPOINT_PREFIX}*.before"):
        shutil.rmtree(backup, ignore_errors=True)
    _remove_partial(checkpoints)


def _remove_partial(checkpoints: Path) -> None:
    for partial in checkpoints.glob(f".{CHECKPOINT_PREFIX}*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
