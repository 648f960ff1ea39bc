"""Local and remote files alike: a `Path`, or a `RemotePath` on any fsspec file system (`s3://`, `gs://`, `memory://`)."""

from __future__ import annotations

import errno
import fnmatch
import io
import posixpath
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import staged_path, sync, write_atomic

if TYPE_CHECKING:
    from fsspec.spec import AbstractFileSystem


@dataclass(frozen=True)
class Stat:
    """What `stat` says of a remote file."""

    st_size: int


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a remote store, with those of pathlib's methods that sources and the builder use."""

    url: str

    @property
    def _fs(self) -> AbstractFileSystem:
        from fsspec.core import url_to_fs

        return url_to_fs(self.url)[0]

    @property
    def _key(self) -> str:
        return cast("str", self._fs._strip_protocol(self.url))

    def _made(self, key: str) -> RemotePath:
        return RemotePath(f"{self.url.split('://', 1)[0]}://{key.lstrip('/')}")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    @property
    def name(self) -> str:
        return posixpath.basename(self.url.rstrip("/"))

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rstrip("/").rsplit("/", 1)[0])

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def relative_to(self, other: RemotePath) -> Path:
        return Path(posixpath.relpath(self._key, other._key))

    def open(self, mode: str = "r", **options: Any) -> IO[Any]:
        if "b" in mode:
            return cast("IO[Any]", self._fs.open(self._key, mode))
        return io.TextIOWrapper(
            self._fs.open(self._key, mode + "b"), **{"encoding": "utf-8", **options}
        )

    def read_bytes(self) -> bytes:
        try:
            with translate_store_errors(self):
                return cast("bytes", self._fs.cat_file(self._key))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "No such file", self.url) from error

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        self._fs.pipe_file(self._key, data)
        return len(data)

    def exists(self) -> bool:
        return bool(self._fs.exists(self._key))

    def is_file(self) -> bool:
        return bool(self._fs.isfile(self._key))

    def is_dir(self) -> bool:
        return bool(self._fs.isdir(self._key))

    def stat(self) -> Stat:
        return Stat(int(self._fs.info(self._key)["size"]))

    def iterdir(self) -> Iterator[RemotePath]:
        for entry in sorted(e.rstrip("/") for e in self._fs.ls(self._key, detail=False)):
            if posixpath.basename(entry):
                yield self._made(entry)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        yield from (
            self._made(k) for k in sorted(self._fs.glob(f"{self._key.rstrip('/')}/{pattern}"))
        )

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        yield from (
            self._made(k)
            for k in sorted(self._fs.find(self._key))
            if fnmatch.fnmatch(posixpath.basename(k), pattern)
        )

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok or self.exists():
            self._fs.rm_file(self._key)

    def remove_tree(self) -> None:
        """Removes the folder with everything in it."""
        if self.exists():
            self._fs.rm(self._key, recursive=True)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Object stores have no folders; file systems do."""
        self._fs.makedirs(self._key, exist_ok=True)


StoragePath = Path | RemotePath


@contextmanager
def translate_store_errors(place: StoragePath) -> Iterator[None]:
    """Errors of a store's own kinds (aiohttp's, botocore's) and those without a number become OSErrors: the network failed."""
    try:
        yield
    except Exception as error:
        told = isinstance(error, (FileNotFoundError, PermissionError)) or (
            isinstance(error, OSError) and error.errno is not None
        )
        if told or isinstance(place, Path):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(place)) from error


def to_storage_path(text: str | Path | RemotePath) -> StoragePath:
    """A path, or for `scheme://...` a RemotePath.

    Raises:
        UsageError: no such kind of store, or its library is not installed.
    """
    if isinstance(text, RemotePath):
        return text
    whole = str(text)
    if "://" not in whole:
        # Path("s3://bucket") has become "s3:/bucket" where a command line made a Path of it.
        scheme, slash, rest = whole.partition(":/")
        if not slash or not scheme.isalnum() or len(scheme) < 2:
            return Path(text)
        whole = f"{scheme}://{rest.lstrip('/')}"
    if whole.startswith("file://"):
        return Path(whole.removeprefix("file://"))
    try:
        found = RemotePath(whole)
        _ = found._fs
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{whole}: {error}",
            "the store cannot be reached.",
            "install the fsspec library of this store (s3fs, gcsfs).",
        ) from error
    return found


def write(target: StoragePath, data: bytes) -> None:
    """Writes a whole file: locally aside, synced and renamed; remotely in one put."""
    if isinstance(target, Path):
        write_atomic(target, data)
    else:
        target.write_bytes(data)


def move(source: StoragePath, target: StoragePath) -> None:
    """Renames a file within one store; repeating it after it was done is no error."""
    if not source.exists() and target.exists():
        return
    if isinstance(source, Path) and isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    else:
        assert isinstance(source, RemotePath)
        assert isinstance(target, RemotePath)
        try:
            source._fs.mv(source._key, target._key)
        except FileNotFoundError:  # another process that finishes the same build moved it meanwhile
            if not target.exists():
                raise


def put(source: Path, target: StoragePath) -> None:
    """Moves a local file to where it belongs."""
    if isinstance(target, Path):
        device = source.stat().st_dev  # first: where both folders are gone, none is made again
        target.parent.mkdir(parents=True, exist_ok=True)
        if device == target.parent.stat().st_dev:
            source.replace(target)
        else:
            shutil.copyfile(source, staged_path(target))
            staged_path(target).replace(target)
        sync(target.parent)
    else:
        target._fs.put_file(str(source), target._key)
        source.unlink()


def remove_tree(folder: StoragePath) -> None:
    """Removes a folder with everything in it, where it is there."""
    if isinstance(folder, RemotePath):
        folder.remove_tree()
    elif folder.exists():
        shutil.rmtree(folder)
