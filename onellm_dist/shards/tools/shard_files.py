"""Where a tool finds the files of a shard: in the dataset's folder, or copied from a store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.dataset import (
    MANIFEST,
    Manifest,
    ShardInfo,
    list_files,
    read_manifest,
    refuse_outside_links,
)
from onellm_dist.shards.format.index import SUFFIX
from onellm_dist.shards.storage.paths import RemotePath, to_storage_path
from onellm_dist.shards.storage.remote import RemoteFolder

DatasetRoot = Path | RemoteFolder
"""A dataset's folder, on a disk or in a store."""


def open_root(place: str | Path, *, follow_links: bool = False) -> tuple[DatasetRoot, Manifest]:
    """Find a dataset on a disk or in a store, and read its manifest.

    Args:
        place: the folder or URL.
        follow_links: whether its files may be links that lead out of the folder.

    Raises:
        UsageError: there is no dataset, or its manifest is not valid, or a file leads out.
    """
    path = to_storage_path(place)
    if isinstance(path, Path):
        manifest = read_manifest(path)
        if not follow_links:
            refuse_outside_links(path, list_files(path, (s.path for s in manifest.shards))[1])
        return path, manifest
    remote = RemoteFolder(path.url)
    try:
        data = remote.read_file(MANIFEST)
    except OSError as error:
        raise UsageError(
            f"{remote.url}/{MANIFEST} cannot be read: {error}",
            "a dataset is a folder with a manifest.json.",
            "check the URL, the credentials and the endpoint.",
        ) from error
    return remote, Manifest.from_bytes(data, f"{remote.url}/{MANIFEST}")


def find_datasets(place: str | Path) -> list[Path | RemotePath]:
    """Return the folder itself if it is a dataset, else the datasets in it, else itself."""
    path = to_storage_path(place)
    if (path / MANIFEST).exists():
        return [path]
    below = sorted((p.parent for p in path.glob(f"[!.]*/{MANIFEST}")), key=str)
    return list(below) or [path]


def list_names(root: DatasetRoot, shards: Iterable[str]) -> set[str]:
    """List the relative paths of all files in the folders of shards."""
    if isinstance(root, Path):
        return list_files(root, shards)[0]
    folders = {path.rpartition("/")[0] for path in shards}
    return {
        f"{folder}/{name}" if folder else name for folder in folders for name in root.names(folder)
    }


@contextmanager
def open_shard_files(root: DatasetRoot, shard: ShardInfo) -> Iterator[Path]:
    """Yield a local folder that holds a shard's tar and index, under their paths.

    Those of a store are copied to the folder for temporary files (TMPDIR) meanwhile. What does not
    exist is not there.

    Raises:
        OSError: they cannot be copied.
    """
    if isinstance(root, Path):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="onellm-") as folder:
        local = Path(folder)
        (local / shard.path).parent.mkdir(parents=True, exist_ok=True)
        for name in (shard.path, shard.path + SUFFIX):
            with suppress(FileNotFoundError):
                root.download(name, local / name)
        yield local
