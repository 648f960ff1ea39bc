"""Local and remote files through one interface.

A `StoragePath` is a `Path`, or a `RemotePath` on any fsspec file system (`s3://`, `gs://`,
`memory://`).
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import io
import os
import posixpath
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import atomic_path, sync, write_atomic

if TYPE_CHECKING:
    from fsspec.spec import AbstractFileSystem

_THREADS = 16
"""Requests at a time when many files are removed."""


@dataclass(frozen=True)
class RemoteStat:
    """What `stat` reports of a remote file."""

    st_size: int
    """Bytes."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a remote store, with the methods of pathlib that the builder uses."""

    url: str

    @property
    def _fs(self) -> AbstractFileSystem:
        from fsspec.core import url_to_fs

        return url_to_fs(self.url)[0]

    @property
    def _key(self) -> str:
        return cast("str", self._fs._strip_protocol(self.url))

    def _with_key(self, key: str) -> RemotePath:
        return RemotePath(f"{self.url.split('://', 1)[0]}://{key.lstrip('/')}")

    def __str__(self) -> str:
        """The URL."""
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        """The path of an entry below this one."""
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def __lt__(self, other: RemotePath) -> bool:
        """Order by URL."""
        return self.url < other.url

    @property
    def name(self) -> str:
        """The last component."""
        return posixpath.basename(self.url.rstrip("/"))

    @property
    def stem(self) -> str:
        """The last component without its suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """What stands behind the last dot of the name, dot included."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> RemotePath:
        """The folder that holds this."""
        return RemotePath(self.url.rstrip("/").rsplit("/", 1)[0])

    def with_name(self, name: str) -> RemotePath:
        """Return the path of another entry of the same folder."""
        return self.parent / name

    def relative_to(self, other: RemotePath) -> Path:
        """Return this path relative to a folder above it."""
        return Path(posixpath.relpath(self._key, other._key))

    def open(self, mode: str = "r", **options: Any) -> IO[Any]:
        """Open the file, as text (UTF-8) or with a `b` in the mode as bytes."""
        if "b" in mode:
            return cast("IO[Any]", self._fs.open(self._key, mode))
        return io.TextIOWrapper(
            self._fs.open(self._key, mode + "b"), **{"encoding": "utf-8", **options}
        )

    def read_bytes(self) -> bytes:
        """Read the whole file.

        Raises:
            OSError: it cannot be read; FileNotFoundError if it does not exist.
        """
        try:
            with translate_store_errors(self):
                return cast("bytes", self._fs.cat_file(self._key))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "No such file", self.url) from error

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read the whole file as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Write the whole file in one put, and return its size."""
        self._fs.pipe_file(self._key, data)
        return len(data)

    def exists(self) -> bool:
        """Check that there is a file or folder of this name."""
        return bool(self._fs.exists(self._key))

    def is_file(self) -> bool:
        """Check that there is a file of this name."""
        return bool(self._fs.isfile(self._key))

    def is_dir(self) -> bool:
        """Check that there is a folder of this name."""
        return bool(self._fs.isdir(self._key))

    def stat(self) -> RemoteStat:
        """Return the size of the file."""
        return RemoteStat(int(self._fs.info(self._key)["size"]))

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the entries of the folder, sorted."""
        for entry in sorted(e.rstrip("/") for e in self._fs.ls(self._key, detail=False)):
            if posixpath.basename(entry):
                yield self._with_key(entry)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the paths below this folder that match a pattern, sorted.

        Only the pattern has wildcards (`*`, `?`, `[...]`, each within one component): a folder may
        have brackets in its name, which fsspec's own glob would take for wildcards.
        """
        found: list[RemotePath] = [self]
        for component in pattern.split("/"):
            found = [
                entry
                for folder in found
                for entry in folder._list_matching(component)
                if fnmatch.fnmatchcase(entry.name, component)
            ]
        yield from sorted(found)

    def _list_matching(self, component: str) -> list[RemotePath]:
        if not any(sign in component for sign in "*?["):
            entry = self / component
            return [entry] if entry.exists() else []
        try:
            return list(self.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files at any depth whose name matches a pattern, sorted."""
        for key in sorted(self._fs.find(self._key)):
            if fnmatch.fnmatch(posixpath.basename(key), pattern):
                yield self._with_key(key)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        if not missing_ok or self.exists():
            self._fs.rm_file(self._key)

    def remove_tree(self) -> None:
        """Remove the folder with everything in it."""
        if not self.exists():
            return
        # Not `rm(..., recursive=True)`: it takes brackets in names for wildcards.
        fs = self._fs
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(fs.rm_file, fs.find(self._key)):
                pass
        if not fs.isdir(self._key):  # stores have no folders of their own; file systems do
            return
        if not glob.has_magic(self._key):
            fs.rm(self._key, recursive=True)
            return
        # Nor of an escaped name: before 2026.6, fsspec expands what it finds once more.
        for folder in sorted(fs.find(self._key, withdirs=True), reverse=True):
            fs.rmdir(folder)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the folder. Object stores have no folders; file systems do."""
        self._fs.makedirs(self._key, exist_ok=True)


StoragePath = Path | RemotePath


@contextmanager
def translate_store_errors(path: StoragePath) -> Iterator[None]:
    """Raise a store's own errors (aiohttp's, botocore's) and OSErrors without a number as EIO.

    Whoever reads from a store then sees a network fault as an OSError of that kind.
    """
    try:
        yield
    except Exception as error:
        clear = isinstance(error, (FileNotFoundError, PermissionError)) or (
            isinstance(error, OSError) and error.errno is not None
        )
        if clear or isinstance(path, Path):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(path)) from error


def to_storage_path(text: str | Path | RemotePath) -> StoragePath:
    """Return a Path, or a RemotePath for `scheme://...`.

    Raises:
        UsageError: no such kind of store exists, or its library is not installed.
    """
    if isinstance(text, RemotePath):
        return text
    url = str(text)
    if "://" not in url:
        # A command line that makes a Path of "s3://bucket" passes "s3:/bucket".
        scheme, slash, rest = url.partition(":/")
        if not slash or not scheme.isalnum() or len(scheme) < 2:
            return Path(text)
        url = f"{scheme}://{rest.lstrip('/')}"
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    try:
        found = RemotePath(url)
        _ = found._fs
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{url}: {error}",
            "the store cannot be reached.",
            "install the fsspec library of this store (s3fs, gcsfs).",
        ) from error
    return found


def read_range(path: Path | str, start: int, end: int) -> bytes:
    """Read bytes start .. end - 1 of a local file; fewer only if it ends before.

    Raises:
        OSError: they cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """Read up to `size` bytes, fewer at the end of the file (one pread stops at 2 GiB on Linux)."""
    pieces: list[bytes] = []
    while size > 0:
        piece = os.pread(descriptor, size, offset)
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def write_file(target: StoragePath, data: bytes) -> None:
    """Write a file so that it appears complete: atomically on a disk, in one put in a store."""
    if isinstance(target, Path):
        write_atomic(target, data)
    else:
        target.write_bytes(data)


def move_file(source: StoragePath, target: StoragePath) -> None:
    """Rename a file within one store. Repeating a rename that was done is not an error."""
    if not source.exists() and target.exists():
        return
    if isinstance(source, Path) and isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        return
    assert isinstance(source, RemotePath)
    assert isinstance(target, RemotePath)
    try:
        # Not `mv`: it takes brackets in names for wildcards.
        source._fs.cp_file(source._key, target._key)
        source._fs.rm_file(source._key)
    except FileNotFoundError:  # another process that finishes the same build has moved it
        if not target.exists():
            raise


def store_file(source: Path, target: StoragePath) -> None:
    """Move a local file to its final place, on a disk or in a store."""
    if not isinstance(target, Path):
        target._fs.put_file(str(source), target._key)
        source.unlink()
        return
    device = source.stat().st_dev  # first: if both folders are gone, none is made again
    target.parent.mkdir(parents=True, exist_ok=True)
    if device == target.parent.stat().st_dev:
        source.replace(target)
        sync(target.parent)
    else:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def remove_tree(folder: StoragePath) -> None:
    """Remove a folder with everything in it, if it exists."""
    if isinstance(folder, RemotePath):
        folder.remove_tree()
    elif folder.exists():
        shutil.rmtree(folder)
