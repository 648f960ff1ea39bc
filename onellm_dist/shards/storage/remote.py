"""A folder behind a URL (s3://, gs://, http://, memory:// ...), read by byte range through fsspec.

Credentials and endpoints come from where the protocol's own tools take them (`AWS_*`, `~/.aws`, `~/.config/fsspec/`): no
recipe holds a secret. fsspec's file systems are not safe to use after a fork, so each process opens its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from onellm_dist.common.errors import UsageError

T = TypeVar("T")


def is_url(place: object) -> bool:
    """Whether a dataset's place is a URL and not a local path."""
    return isinstance(place, str) and "://" in place


class RemoteFolder:
    """The files below one URL. May be pickled and forked."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str]]:
        return RemoteFolder, (self.url,)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes start .. end - 1 of a file; fewer only where it ends before.

        Raises:
            OSError: they cannot be read.
        """
        data = self._call(name, lambda fs, path: fs.cat_file(path, start=start, end=end))
        if len(data) > end - start:
            raise OSError(
                f"{self.url}/{name}: the server sends whole files and not the byte range asked for"
            )
        return data

    def read_whole(self, name: str) -> bytes:
        """A whole (small) file.

        Raises:
            OSError: it cannot be read; FileNotFoundError where it is not there.
        """
        return self._call(name, lambda fs, path: fs.cat_file(path))

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            OSError: it is not there, or nobody says how large it is.
        """
        size = self._call(name, lambda fs, path: fs.info(path)["size"])
        if size is None:
            raise OSError(f"{self.url}/{name}: the server does not say how large it is")
        return int(size)

    def names(self, folder: str) -> set[str]:
        """Names of the files in a folder below; none where there is no such folder, or the protocol cannot list (http)."""
        try:
            found = self._call(folder, lambda fs, path: fs.ls(path, detail=False, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {str(path).rstrip("/").rsplit("/", 1)[-1] for path in found}

    def fetch(self, name: str, target: Path) -> None:
        """Copies a file to `target`, which appears whole.

        Raises:
            OSError: it cannot be read, or not be written.
        """
        data = self.read_whole(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_copy(target, data)

    def _call(self, name: str, action: Callable[[Any, str], T]) -> T:
        fs, base = self._file_system()
        try:
            return action(fs, f"{base}/{name}" if name else base)
        except OSError:
            raise
        except (
            Exception
        ) as error:  # aiohttp's and botocore's own; whoever retries knows OSError alone
            raise OSError(f"{self.url}/{name}: {type(error).__name__}: {error}") from error

    def _file_system(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_open(self.url))
        return self._opened[1:]


def write_copy(target: Path, data: bytes) -> None:
    """Writes `data` aside and renames it; several processes may write the same copy at once."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.aside")
    try:
        aside.write_bytes(data)
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(url)
    except ImportError as error:  # its message names the package
        raise UsageError(
            f"{url}: {error}",
            "fsspec reads each protocol through a package of its own.",
            "pip install 'onellm-dist[remote]'",
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{url}: {error}", "nothing can be read from it.", "check the protocol in front of ://."
        ) from error
    return fs, str(path).rstrip("/")
