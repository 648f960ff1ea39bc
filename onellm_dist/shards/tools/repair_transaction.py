"""How a repair changes a dataset: all at once, by replacing its manifest.

A repaired tar gets a name of its own (`x.repaired-1.tar`; in sample ids it is still `x`), so every
file that the old manifest lists stays as it is until the new manifest has its name. A repair that
is refused, fails or is killed before then has changed nothing; one that is killed later has only
to be cleaned up, which the next repair does first.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import STAGED, sync, write_atomic
from onellm_dist.shards.build.finish import format_quarantine
from onellm_dist.shards.format.dataset import MANIFEST, Manifest, ShardInfo, list_files
from onellm_dist.shards.format.index import SUFFIX
from onellm_dist.shards.format.index_media import index_media
from onellm_dist.shards.format.index_tar import index_tar
from onellm_dist.shards.sources.base import QuarantinedSample

DAMAGED = ".damaged"
"""Suffix of a tar's old bytes."""
REPAIRED = "repaired.jsonl"
"""The samples that repairs left out, with reasons; every repair appends to it."""
_ENERGON = ".idx"
"""Suffix of Energon's index of a tar."""
_GENERATION = re.compile(r"(.+?)(?:\.repaired-([1-9]\d{0,8}))?\.tar")
"""The path of a shard, and how often it was repaired."""


@dataclass
class RepairTransaction:
    """The changes of one repair, none of which is visible before `commit`."""

    root: Path
    done: list[str] = field(default_factory=list)
    """A line for the user a repair."""
    lost: list[QuarantinedSample] = field(default_factory=list)
    """Samples that are left out."""
    _created: list[Path] = field(default_factory=list)
    """Repaired tars, which no manifest lists yet."""
    _retired: list[Path] = field(default_factory=list)
    """Tars that the new manifest does not list."""
    media_of: Collection[str] | None = None
    """The modalities of a dataset that lists its media; None: it does not."""
    _stale: list[Path] = field(default_factory=list)
    """Tars whose index is made again."""

    def retire(self, tar: Path) -> Path:
        """Let the new manifest do without a tar, and return the name that its bytes will have."""
        self._retired.append(tar)
        return find_free_name(tar)

    def renew_index(self, tar: Path) -> None:
        """Make the index of a tar again, which is unusable or belongs to other bytes."""
        self._stale.append(tar)

    def create(self, shard: ShardInfo) -> str:
        """Return the path of the tar that replaces a shard's."""
        name, generation = _split_path(shard.path)
        while True:
            generation += 1
            path = f"{name}.repaired-{generation}.tar"
            if not (self.root / path).exists():
                self._created.append(self.root / path)
                return path

    def get_created(self) -> Collection[Path]:
        """Return the tars that the new manifest will list and the old one does not."""
        return tuple(self._created)

    def abandon(self) -> None:
        """Remove what was created; the dataset is as it was."""
        for tar in self._created:
            for path in (tar, _beside(tar, SUFFIX), _beside(tar, STAGED)):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def commit(self, manifest: Manifest, *, changed: bool) -> None:
        """Make the changes.

        Args:
            manifest: the dataset's new manifest.
            changed: whether it differs from the old one.

        Raises:
            OSError: the disk refuses. If the manifest could not be written, nothing was changed
                but the list of samples left out.
        """
        self._append_lost()
        if changed:
            write_atomic(self.root / MANIFEST, manifest.to_file())
        for tar in self._stale:
            index_tar(tar, any_key=True)
            fault = index_media(tar, self.media_of, listed=True) if self.media_of else None
            if fault is not None:
                raise fault
        for tar in self._retired:
            move_to_damaged(tar)

    def _append_lost(self) -> None:
        path = self.root / REPAIRED
        old = path.read_bytes() if path.exists() else b""
        known = set(old.splitlines())
        new = [
            line for line in format_quarantine(self.lost).splitlines() if line not in known
        ]  # a repair that was killed may have listed them already
        if new:
            write_atomic(path, old + b"".join(line + b"\n" for line in new))


def clean_up(
    root: Path, manifest: Manifest, done: list[str], *, keep: Collection[Path] = ()
) -> None:
    """Finish a repair that was killed, or remove what it left; and what stopped writers left.

    Args:
        root: the dataset's folder.
        manifest: its manifest.
        done: a line is appended for each file.
        keep: tars that stay although the manifest does not list them yet.
    """
    listed = {shard.path for shard in manifest.shards}
    current = dict(_split_path(path) for path in listed)
    for path in sorted(list_files(root, listed)[0] - listed):
        tar = root / path
        if tar in keep:
            continue
        if path.endswith(STAGED) and not tar.is_symlink():
            tar.unlink()
            done.append(f"{path}: left by a writer that was stopped; removed")
        elif path.endswith(".tar"):
            name, generation = _split_path(path)
            now = current.get(name)
            kept = f"{name}.repaired-{now}.tar" if now else f"{name}.tar"
            if now is None or not (root / kept).is_file():
                continue
            if generation > now:
                _beside(tar, SUFFIX).unlink(missing_ok=True)
                tar.unlink()
                done.append(f"{path}: left by a repair that was stopped; removed")
            else:
                damaged = move_to_damaged(tar)
                done.append(f"{path}: replaced by a repair that was stopped; now {damaged.name}")


def move_to_damaged(tar: Path) -> Path:
    """Rename a tar that no manifest lists, and remove its indexes. Return its new name."""
    damaged = find_free_name(tar)
    for suffix in (SUFFIX, _ENERGON):  # first: as long as the tar is there, a repair finds it
        _beside(tar, suffix).unlink(missing_ok=True)
    tar.replace(damaged)
    sync(tar.parent)
    return damaged


def find_free_name(tar: Path) -> Path:
    """Return a name for a tar's old bytes that nothing has."""
    first = _beside(tar, DAMAGED)
    number, path = 1, first
    while path.exists() or path.is_symlink():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path


@contextmanager
def hold_dataset(root: Path) -> Iterator[None]:
    """Hold a lock on the dataset's folder, so that two repairs do not meet.

    File systems without locks of folders go without.

    Raises:
        UsageError: another repair holds it.
    """
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(
            f"{root}: another process repairs this dataset.",
            "two repairs at once would undo each other.",
            "wait for it.",
        ) from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _beside(tar: Path, suffix: str) -> Path:
    return tar.with_name(tar.name + suffix)


def _split_path(path: str) -> tuple[str, int]:
    """Split the path of a shard into its name and how often it was repaired."""
    match = _GENERATION.fullmatch(path)
    assert match is not None, path
    return match.group(1), int(match.group(2) or 0)
