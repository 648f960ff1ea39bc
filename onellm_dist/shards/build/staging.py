"""An output folder that appears under its name only when it is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import sync
from onellm_dist.shards.format.dataset import MANIFEST, SHARD_FOLDER
from onellm_dist.shards.format.writer import refuse_occupied

QUARANTINE = "quarantine.jsonl"
"""The list of bad samples in a dataset's folder."""
DAMAGED = "damaged.jsonl"
"""Samples that are used although some of their media is missing."""


def get_failed_quarantine_path(out: Path) -> Path:
    """Return where the list of bad samples lies after a build that failed.

    Nothing else of such a build is kept.
    """
    return out.with_name(f"{out.name}.{QUARANTINE}")


@contextmanager
def open_staging_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty staging folder beside `out`, and rename it to `out` when the block ends.

    If the block raises, the folder is removed, except for its quarantine file, which becomes
    `<out>.quarantine.jsonl`. What a killed builder left is removed at the next start.

    Args:
        out: the output folder.
        overwrite: replace a dataset (or a folder of datasets) at `out`; anything else is refused.

    Raises:
        UsageError: `out` is occupied, or another builder is working on it.
    """
    out = Path(os.path.abspath(out))
    staging = get_staging_folder(out)
    refuse_output(out, overwrite=overwrite)
    with lock_folder(staging, out, shared=False):
        empty_folder(staging)
        try:
            yield staging
        except BaseException:
            with suppress(FileNotFoundError):
                (staging / QUARANTINE).replace(get_failed_quarantine_path(out))
            shutil.rmtree(staging)
            raise
        replace_output(staging, out)


def get_staging_folder(out: Path) -> Path:
    """Return the folder where `out` is built."""
    return out.with_name(f".{out.name}.building")


def _get_replaced_folder(out: Path) -> Path:
    """Return where the old output lies between the two renames that replace it."""
    return out.with_name(f".{out.name}.replaced")


def refuse_output(out: Path, *, overwrite: bool) -> None:
    """Check that `out` is free, or may be replaced.

    Raises:
        UsageError: it holds something that `overwrite` does not allow to replace.
    """
    replaced = _get_replaced_folder(out)
    if replaced.exists() and not out.exists():
        replaced.replace(out)  # a builder was killed between its last two renames
    if overwrite and is_built_here(out):
        return
    if is_folder_of_datasets(out):
        names = sorted(p.name for p in out.iterdir() if p.is_dir())
        more = ", ..." if len(names) > 3 else ""
        raise UsageError(
            f"{out} already holds datasets ({', '.join(names[:3])}{more}).",
            "they are not overwritten unless asked for.",
            "choose another output, or give --overwrite.",
        )
    refuse_occupied(out)


def replace_output(folder: Path, out: Path) -> None:
    """Rename a finished folder to `out`, in place of what was there."""
    replaced = _get_replaced_folder(out)
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(replaced, ignore_errors=True)
        out.replace(replaced)
    folder.replace(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    get_failed_quarantine_path(out).unlink(missing_ok=True)


def is_built_here(path: Path) -> bool:
    """Check that `path` is a dataset of this program, complete or not, or a folder of such."""
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    if MANIFEST in names or names == {SHARD_FOLDER}:
        return SHARD_FOLDER in names
    return is_folder_of_datasets(path)


def is_folder_of_datasets(path: Path) -> bool:
    """Check that `path` holds complete datasets of this program, a folder each, and no more."""
    if not path.is_dir():
        return False
    folders = {p.name for p in path.iterdir()} - {QUARANTINE}
    return bool(folders) and all(_is_dataset(path / name) for name in folders)


def _is_dataset(path: Path) -> bool:
    return (path / MANIFEST).is_file() and (path / SHARD_FOLDER).is_dir()


@contextmanager
def lock_folder(staging: Path, out: Path, *, shared: bool) -> Iterator[int]:
    """Make the staging folder, lock it, and yield the lock's descriptor.

    Args:
        staging: the folder.
        out: the output, for messages.
        shared: share the lock with others that build the same.

    Raises:
        UsageError: another builder holds the lock.
    """
    staging.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        if not try_lock(descriptor, shared=shared):
            raise UsageError(
                f"{out} is being built by another process.",
                "two builders would damage each other's output.",
                "wait for it, or choose another output.",
            )
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, *, shared: bool) -> bool:
    """Acquire a lock, or change a lock that is held, and return whether that succeeded.

    On a file system without locks (some NFS mounts) it always succeeds; there the user must not
    build two different things at once.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def empty_folder(folder: Path) -> None:
    """Remove everything in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
