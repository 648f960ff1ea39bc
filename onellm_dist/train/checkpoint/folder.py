"""Checkpoints of the trainable state, elastic: written by ranges, read by ranges, at any number of ranks and by any engine.

A checkpoint is a folder `step-00000100` (100 steps are done; step index 100 comes next):

    rank-00000.safetensors   what rank 0 held: `<parameter>:<start>:<key>` -> [length] fp32, key one of master, exp_avg, exp_avg_sq
    rank-00001.safetensors   ...
    manifest.json            version, step, optimizer_steps, when it was written (seconds since 1970), what the run adds, every file's
                             size and SHA-256 (since version 2), every parameter's shape and pieces

It is written as `.step-00000100.partial`, synced file by file, and renamed when whole (checkpoint_writer.py). Frozen weights are not in
it: they come from `model.path` or `model.preset` again (checkpoint_source.py).
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

from onellm_dist.common.files import sync
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST, CHECKPOINT_PREFIX
from onellm_dist.train.checkpoint.files import Written

VERSION = 2
READABLE = (1, 2)
"""Version 1 had no checksums."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole checkpoint, or None: missing, of an unknown version, or a file is missing or cut short."""
    try:
        manifest = json.loads((folder / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
        whole = manifest["version"] in READABLE and all(
            (folder / n).stat().st_size == size for n, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def recorded_files(folder: Path, manifest: dict[str, Any]) -> list[tuple[Path, Written]]:
    """The files of a checkpoint as its manifest records them; none where it has no checksums."""
    digests = manifest.get("sha256", {})
    return [
        (folder / name, Written(size, digests[name]))
        for name, size in manifest["files"].items()
        if name in digests
    ]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"{CHECKPOINT_PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """Steps done, by a checkpoint's folder name."""
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint in `checkpoints` that is whole, as far as its manifest and the sizes of its files tell."""
    return next(
        (folder for folder in reversed(folders(checkpoints)) if read_manifest(folder) is not None),
        None,
    )


def prune(
    checkpoints: Path,
    keep: int,
    keep_every: int | None = None,
    keep_every_hours: float | None = None,
) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what unfinished writes left.

    One that is cut short, as far as manifest and sizes tell, is not counted: it goes if it is older than those that stay. One whose
    checksums alone are wrong is moved aside by whoever finds that out (a start, a roll-back).

    Args:
        keep_every: those whose step is a multiple of it stay for ever.
        keep_every_hours: so do the first whole one, and then one whenever so many hours lie between it and the last that stayed so.
    """
    every = folders(checkpoints)
    newest = list(
        islice((folder for folder in reversed(every) if read_manifest(folder) is not None), keep)
    )
    oldest = step_of(newest[-1]) if newest else 0
    lasting = {
        folder
        for folder in every
        if keep_every and step_of(folder) and step_of(folder) % keep_every == 0
    }
    if keep_every_hours is not None:
        lasting |= _hours_apart(every, keep_every_hours)
    for folder in every:
        if step_of(folder) < oldest and folder not in lasting:
            shutil.rmtree(folder, ignore_errors=True)
    for partial in checkpoints.glob(f".{CHECKPOINT_PREFIX}*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _hours_apart(every: Sequence[Path], hours: float) -> set[Path]:
    """What stays of these, the oldest first, by when they were written; a state before the first step does not."""
    found = set[Path]()
    last = -math.inf
    for folder in every:
        manifest = folder / CHECKPOINT_MANIFEST
        written = _written(folder, manifest.stat().st_mtime) if manifest.exists() else None
        if written is not None and step_of(folder) and written - last >= 3600 * hours:
            found.add(folder)
            last = written
    return found


@cache
def _written(folder: Path, changed: float) -> float | None:
    """When a whole checkpoint was written; the manifest's own time where it does not say. Each is read once a process: they are long."""
    manifest = read_manifest(folder)
    return None if manifest is None else float(manifest.get("written", changed))


def folders(checkpoints: Path) -> list[Path]:
    """Every folder that is named like a checkpoint, the oldest first."""
    return sorted(
        (
            f
            for f in checkpoints.glob(f"{CHECKPOINT_PREFIX}*")
            if f.name.removeprefix(CHECKPOINT_PREFIX).isdigit()
        ),
        key=step_of,
    )


def tensor_name(name: str, start: int, key: str) -> str:
    """How a range of a parameter is called in a checkpoint's files."""
    return f"{name}:{start}:{key}"


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a whole, synced folder its name. What has that name goes first, and comes back (`restore_displaced`) if a kill falls between."""
    before = _displaced(folder)
    shutil.rmtree(before, ignore_errors=True)
    if (
        folder.exists()
    ):  # a run that came back to an older checkpoint passes this step a second time
        folder.rename(before)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def restore_displaced(checkpoints: Path) -> None:
    """Give back their names to checkpoints that were being replaced when a start was killed, and remove unfinished ones."""
    for before in checkpoints.glob(f".{CHECKPOINT_PREFIX}*.before"):
        folder = before.with_name(before.name[1:].removesuffix(".before"))
        if not folder.exists():
            before.rename(folder)
        else:
            shutil.rmtree(before, ignore_errors=True)
    for partial in checkpoints.glob(f".{CHECKPOINT_PREFIX}*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _displaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")
