"""An output folder that gets its name when it is complete; a later start can resume it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onellm_dist.common.checksums import RECORD
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import replace_folder, restore_folder, sync, write_atomic
from onellm_dist.convert.tensors.writers import FileDigest

_JOURNAL = ".journal.json"
"""The complete files of a folder that is being written."""


class StagingFolder:
    """A folder that is being written, and its complete files.

    Args:
        folder: the folder.
        fingerprint: digest of everything that decides the bytes written.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self.done: dict[str, FileDigest] = {}

    def resume(self) -> None:
        """Keep the complete files of an earlier start of the same conversion, remove all others."""
        try:
            journal = json.loads((self.folder / _JOURNAL).read_text(encoding="utf-8"))
            files = journal["files"] if journal["fingerprint"] == self._fingerprint else {}
        except (OSError, ValueError, KeyError, TypeError):
            files = {}
        for name, (size, digest) in files.items():
            path = self.folder / name
            if path.is_file() and path.stat().st_size == size:
                self.done[name] = FileDigest(size, digest)
        for path in self.folder.iterdir():
            if path.name not in self.done and path.name != _JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def keep(self, name: str, digest: FileDigest) -> None:
        """Record a complete file, which a later start need not write again."""
        self.done[name] = digest
        files = {n: (d.bytes, d.sha256) for n, d in self.done.items()}
        journal = {"fingerprint": self._fingerprint, "files": files}
        write_atomic(self.folder / _JOURNAL, json.dumps(journal))

    def remove_incomplete(self) -> None:
        """Remove all files that a later start cannot use."""
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in self.done and path.name != _JOURNAL:
                path.unlink()

    def finish(self) -> None:
        """Remove the journal and force the folder to the disk."""
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name not in self.done and path.is_file():
                sync(path)
        sync(self.folder)


@contextmanager
def stage_output(
    out: Path, *, overwrite: bool, fingerprint: str, needs: int
) -> Iterator[StagingFolder]:
    """Yield a staging folder beside `out`; it becomes `out` when the block ends without an error.

    If the process is killed or the disk is full, complete files stay in `.<name>.partial` and the
    same conversion resumes from them. After any other error nothing stays.

    Args:
        out: the folder to write.
        overwrite: replace a folder that an earlier conversion wrote.
        fingerprint: digest of source and options; another one starts from the beginning.
        needs: bytes that will be written.

    Raises:
        UsageError: `out` exists, another process writes it, or the disk has too little room.
        OneLLMError: the disk filled up or failed.
    """
    out = Path(os.path.abspath(out))
    restore_folder(out)
    _check_unoccupied(out, overwrite)
    folder = out.with_name(f".{out.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, out)
        stage = StagingFolder(folder, fingerprint)
        stage.resume()
        _check_room(out, needs - sum(d.bytes for d in stage.done.values()))
        with _clean_up(stage, out):
            yield stage
            stage.finish()
            replace_folder(folder, out)
    finally:
        os.close(lock)
        with suppress(OSError):
            folder.rmdir()  # it is empty where nothing was begun


@contextmanager
def _clean_up(stage: StagingFolder, out: Path) -> Iterator[None]:
    try:
        yield
    except OneLLMError:
        shutil.rmtree(stage.folder, ignore_errors=True)
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        stage.remove_incomplete()
        raise OneLLMError(
            f"{out} was not written: {'the disk is full' if full else error}",
            f"it does not exist; complete files are kept in {stage.folder.name}.",
            "make room and run the same command again, or remove that folder.",
        ) from error


def _check_unoccupied(out: Path, overwrite: bool) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.is_dir() and overwrite and (out / RECORD).is_file():
        return
    if os.path.lexists(out):
        raise UsageError(
            f"{out} is not empty" if out.is_dir() else f"{out} exists already",
            f"only a folder that a conversion wrote ({RECORD}) is replaced."
            if overwrite
            else "its files would be overwritten.",
            "name a new directory, or --overwrite.",
        )


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{out} is being written by another process",
            "two conversions would overwrite each other's files.",
            "wait for it, or name another output.",
        ) from error
    except OSError:
        return  # a file system without locks: there the user must not start two conversions at once


def _check_room(out: Path, needs: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needs > free:
        raise UsageError(
            f"{out.parent} has {free / 1e9:.2f} GB free, {needs / 1e9:.2f} GB are needed",
            "the disk would fill up.",
            "make room, or write to another disk.",
        )
