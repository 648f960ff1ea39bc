"""An output folder that appears under its name only when it is whole."""

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


def get_failed_quarantine_path(out: Path) -> Path:
    """Where the list of bad samples lies after a build that was given up (nothing else of it is kept)."""
    return out.with_name(f"{out.name}.{QUARANTINE}")


@contextmanager
def open_staging_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields an empty staging folder beside `out`, and renames it to `out` when the block ends without an error.

    An error removes it, except for its quarantine file, which becomes `<out>.quarantine.jsonl`. What a killed builder left
    is cleared at the next start. With `overwrite`, a dataset (or a folder of datasets) that stood at `out` is replaced
    at the end; anything else there is refused.

    Raises:
        UsageError: `out` is occupied, or another builder is working on it.
    """
    out = Path(os.path.abspath(out))
    staging = get_staging_folder(out)
    refuse_output(out, overwrite=overwrite)
    with lock_folder(staging, out, shared=False):
        clear(staging)
        try:
            yield staging
        except BaseException:
            with suppress(FileNotFoundError):
                (staging / QUARANTINE).replace(get_failed_quarantine_path(out))
            shutil.rmtree(staging)
            raise
        replace_output(staging, out)


def get_staging_folder(out: Path) -> Path:
    """The folder where `out` is built."""
    return out.with_name(f".{out.name}.building")


def refuse_output(out: Path, *, overwrite: bool) -> None:
    """Raises UsageError where `out` is occupied by anything that `overwrite` does not allow to replace."""
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists() and not out.exists():
        replaced.replace(out)  # a builder was killed between its last two renames
    if not (overwrite and is_built_here(out)):
        refuse_occupied(out)


def replace_output(folder: Path, out: Path) -> None:
    """Renames a finished folder to `out`, in place of what stood there."""
    replaced = out.with_name(f".{out.name}.replaced")
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(replaced, ignore_errors=True)
        out.replace(replaced)
    folder.replace(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    get_failed_quarantine_path(out).unlink(missing_ok=True)


def is_built_here(path: Path) -> bool:
    """`path` is a dataset of this program (whole or half-written), or a folder of nothing but such."""
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    if MANIFEST in names or names == {SHARD_FOLDER}:
        return SHARD_FOLDER in names
    folders = names - {QUARANTINE}
    return bool(folders) and all(_is_dataset(path / name) for name in folders)


def _is_dataset(path: Path) -> bool:
    return (path / MANIFEST).is_file() and (path / SHARD_FOLDER).is_dir()


@contextmanager
def lock_folder(staging: Path, out: Path, *, shared: bool) -> Iterator[int]:
    """Makes the staging folder and locks it: alone, or together with others that build the same. Yields the lock's descriptor.

    Raises:
        UsageError: another builder holds it.
    """
    staging.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        if not lock(descriptor, shared=shared):
            raise UsageError(
                f"{out} is being built by another process.",
                "two builders would spoil each other's output.",
                "wait for it, or choose another output.",
            )
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, shared: bool) -> bool:
    """Whether the lock was got (or changed to this kind)."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks (some NFS mounts): two builders of different things are the user's care there
        return True
    return True


def clear(folder: Path) -> None:
    """Removes everything in the folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
