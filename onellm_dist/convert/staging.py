"""An output folder that is made aside, can be taken up again after a kill, and gets its name when it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import sync
from onellm_dist.convert.tensors.writers import Written

RECORD = "conversion.json"
"""Stands in every folder that was written here; only such a folder is ever replaced."""
_JOURNAL = ".journal.json"


class Stage:
    """The folder in the making, and which of its files are whole already."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint
        self.done: dict[str, Written] = {}

    def resume(self) -> None:
        """Keep the whole files of an earlier start of the same conversion, clear everything else."""
        try:
            journal = json.loads((self.folder / _JOURNAL).read_text(encoding="utf-8"))
            files = journal["files"] if journal["fingerprint"] == self._fingerprint else {}
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            files = {}
        for name, (size, digest) in files.items():
            path = self.folder / name
            if path.is_file() and path.stat().st_size == size:
                self.done[name] = Written(size, digest)
        for path in self.folder.iterdir():
            if path.name not in self.done and path.name != _JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def keep(self, name: str, written: Written) -> None:
        """`name` is whole: a later start need not write it again."""
        self.done[name] = written
        journal: dict[str, Any] = {
            "fingerprint": self._fingerprint,
            "files": {n: (w.bytes, w.sha256) for n, w in self.done.items()},
        }
        partial = self.folder / f"{_JOURNAL}.new"
        partial.write_text(json.dumps(journal), encoding="utf-8")
        partial.replace(self.folder / _JOURNAL)

    def finish(self) -> None:
        """Remove the journal and force the folder to the disk."""
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name not in self.done and path.is_file():
                sync(path)
        sync(self.folder)


@contextmanager
def staged(out: Path, *, overwrite: bool, fingerprint: str, needs: int) -> Iterator[Stage]:
    """Yields a staging folder beside `out` that becomes `out` when the block ends without an error.

    After a kill or a full disk its whole files stay (`.<name>.partial`) and the same conversion goes on from them; after
    any other error nothing stays.

    Args:
        fingerprint: of source and options; another one starts anew.
        needs: bytes that will be written; more than the disk has is refused.

    Raises:
        UsageError: `out` is there, another process writes it, or the disk has no room.
        OneLLMError: the disk filled up or failed.
    """
    out = Path(os.path.abspath(out))
    before = _aside(out)
    if before.exists() and not out.exists():
        before.replace(out)  # a conversion was killed between its last two renames
    _refuse_occupied(out, overwrite)
    folder = out.with_name(f".{out.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, out)
        stage = Stage(folder, fingerprint)
        stage.resume()
        _check_room(out, needs - sum(w.bytes for w in stage.done.values()))
        with _cleaned(stage, out):
            yield stage
            stage.finish()
            _rename(folder, out)
    finally:
        os.close(lock)
        with suppress(OSError):
            folder.rmdir()  # where nothing was begun


@contextmanager
def _cleaned(stage: Stage, out: Path) -> Iterator[None]:
    try:
        yield
    except OneLLMError:
        shutil.rmtree(stage.folder, ignore_errors=True)
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        for path in stage.folder.iterdir():
            if path.is_file() and path.name not in stage.done and path.name != _JOURNAL:
                path.unlink()
        raise OneLLMError(
            f"{out} was not written: {'the disk is full' if full else error}",
            f"nothing stands under that name; files that were whole are kept in {stage.folder.name}.",
            "make room and run the same command again, or remove that folder.",
        ) from error


def _refuse_occupied(out: Path, overwrite: bool) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.is_dir() and overwrite and (out / RECORD).is_file():
        return
    if os.path.lexists(out):
        why = (
            "its files would be overwritten."
            if not overwrite
            else f"only a folder that a conversion wrote ({RECORD}) is replaced."
        )
        raise UsageError(
            f"{out} is not empty" if out.is_dir() else f"{out} is there already",
            why,
            "name a new directory, or --overwrite.",
        )


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{out} is being written by another process",
            "two conversions would spoil each other.",
            "wait for it, or name another output.",
        ) from error
    except OSError:
        return  # a file system without locks: two conversions at once are the user's care there


def _check_room(out: Path, needs: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needs > free:
        raise UsageError(
            f"{out.parent} has {free / 1e9:.2f} GB free, {needs / 1e9:.2f} GB are needed",
            "the disk would fill up.",
            "make room, or write to another disk.",
        )


def _rename(folder: Path, out: Path) -> None:
    before = _aside(out)
    shutil.rmtree(before, ignore_errors=True)
    if out.exists():
        out.replace(before)
    folder.replace(out)
    sync(out.parent)
    shutil.rmtree(before, ignore_errors=True)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.before")
