"""An output folder that appears under its name only when it is whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onellm_dist.errors import UsageError
from onellm_dist.shards.files import sync_folder
from onellm_dist.shards.format import MANIFEST, SHARD_FOLDER
from onellm_dist.shards.writer import refuse_occupied

QUARANTINE = "quarantine.jsonl"


def failed_quarantine(out: Path) -> Path:
    """Where the list of bad samples lies after a build that was given up (nothing else of it is kept)."""
    return out.with_name(f"{out.name}.{QUARANTINE}")


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields an empty staging folder beside `out`, and renames it to `out` when the block ends without an error.

    An error removes it, except for its quarantine file, which becomes `<out>.quarantine.jsonl`. What a killed builder left
    is cleared at the next start. With `overwrite`, a dataset (or a folder of datasets) that stood at `out` is replaced
    at the end; anything else there is refused.

    Raises:
        UsageError: `out` is occupied, or another builder is working on it.
    """
    out = Path(os.path.abspath(out))
    staging, replaced = out.with_name(f".{out.name}.building"), out.with_name(f".{out.name}.replaced")
    if replaced.exists() and not out.exists():
        replaced.replace(out)  # a builder was killed between its last two renames
    if not (overwrite and is_built_here(out)):
        refuse_occupied(out)
    staging.mkdir(parents=True, exist_ok=True)
    lock = os.open(staging, os.O_RDONLY)
    try:
        _lock(lock, out)
        _clear(staging)
        try:
            yield staging
        except BaseException:
            with suppress(FileNotFoundError):
                (staging / QUARANTINE).replace(failed_quarantine(out))
            shutil.rmtree(staging)
            raise
        if out.exists() and any(out.iterdir()):
            shutil.rmtree(replaced, ignore_errors=True)
            out.replace(replaced)
        staging.replace(out)
        sync_folder(out.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        failed_quarantine(out).unlink(missing_ok=True)
    finally:
        os.close(lock)


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


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{out} is being built by another process.",
            "two builders would spoil each other's output.",
            "wait for it, or choose another output.",
        ) from error
    except OSError:
        return  # a file system without locks (some NFS mounts): two builders at once are the user's care there


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
