"""A folder behind a URL (s3://, gs://, http://, memory:// ...), read by byte range through fsspec.

Credentials and endpoints come from where the tools of the protocol take them (`AWS_*`, `~/.aws`,
`~/.config/fsspec/`), so no recipe holds a secret. fsspec's file systems are not safe to use after a
fork, so each process opens its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import quote

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import get_staged_path

T = TypeVar("T")


def is_url(location: object) -> bool:
    """Check whether the location of a dataset is a URL rather than a local path."""
    return isinstance(location, str) and "://" in location


class RemoteFolder:
    """The files below one URL. It may be pickled and forked."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str]]:
        """Pickle the URL alone; whoever unpickles it opens the store anew."""
        return RemoteFolder, (self.url,)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Read bytes start .. end - 1 of a file; fewer only if it ends before.

        Raises:
            OSError: they cannot be read.
        """
        data = self._call(
            name, lambda fs, path: cast("bytes", fs.cat_file(path, start=start, end=end))
        )
        if len(data) > end - start:
            raise OSError(
                f"{self.url}/{name}: the server sends whole files instead of the requested bytes"
            )
        return data

    def read_file(self, name: str) -> bytes:
        """Read a whole (small) file.

        Raises:
            OSError: it cannot be read; FileNotFoundError if it does not exist.
        """
        return self._call(name, lambda fs, path: cast("bytes", fs.cat_file(path)))

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading from its start to its end.

        Raises:
            OSError: it cannot be opened.
        """
        return self._call(name, lambda fs, path: cast("IO[bytes]", fs.open(path, "rb")))

    def size(self, name: str) -> int:
        """Return the bytes of a file.

        Raises:
            OSError: the file does not exist, or the server does not report its size.
        """
        size = self._call(name, lambda fs, path: fs.info(path)["size"])
        if size is None:
            raise OSError(f"{self.url}/{name}: the server does not report its size")
        return int(size)

    def names(self, folder: str) -> set[str]:
        """Return the names of the files in a folder below.

        The set is empty if there is no such folder, or if the protocol cannot list (http).
        """
        try:
            found = self._call(folder, lambda fs, path: fs.ls(path, detail=False, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {str(path).rstrip("/").rsplit("/", 1)[-1] for path in found}

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to `target`, which appears complete.

        Raises:
            OSError: the file cannot be read, or `target` cannot be written.
        """
        data = self.read_file(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_cached(target, data)

    def download(self, name: str, target: Path) -> None:
        """Copy a file of any size to `target`.

        Raises:
            OSError: the file cannot be read, or `target` cannot be written; FileNotFoundError if
                the file does not exist, and then there is no `target`.
        """
        try:
            self._call(name, lambda fs, path: fs.get_file(path, str(target)))
        except OSError:
            target.unlink(missing_ok=True)
            raise

    def _call(self, name: str, action: Callable[[Any, str], T]) -> T:
        fs, base = self._get_file_system()
        if self.url.startswith(("http://", "https://")):
            # Elsewhere a name is a key. Here `%2e%2e` would lead out of the folder, and `?` and
            # `#` would end the name.
            name = quote(name)
        try:
            return action(fs, f"{base}/{name}" if name else base)
        except OSError:
            raise
        except Exception as error:  # aiohttp's and botocore's own; callers retry OSErrors alone
            raise OSError(f"{self.url}/{name}: {type(error).__name__}: {error}") from error

    def _get_file_system(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_open(self.url))
        return self._opened[1:]


def write_cached(target: Path, data: bytes) -> None:
    """Write a copy in the user's cache: renamed into place, but not forced to the disk.

    Several threads and processes may write the same copy at once. A copy is checked when it is
    opened and can be fetched again, so it needs no sync (`write_atomic` would force one a file).
    """
    name = f".{target.name}.{os.getpid()}.{threading.get_ident()}"
    temporary = get_staged_path(target.with_name(name))
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(url)
    except ImportError as error:  # its message names the package
        raise UsageError(
            f"{url}: {error}",
            "fsspec reads each protocol through a package of its own.",
            "install the package that the message names (the extra `remote` of this package has "
            "those for S3 and http).",
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{url}: {error}", "nothing can be read from it.", "check the protocol before ://."
        ) from error
    return fs, str(path).rstrip("/")
