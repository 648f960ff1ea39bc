"""The shard format: a dataset is a folder with `manifest.json`, tars, and an index beside each tar.

`docs/reference/shards.md` describes the format byte by byte. Opening a dataset reads the
manifest and lists the shard folders. An index is opened when a sample of its shard is read, so a
dataset of 10^8 samples opens in a fraction of a second.

The folder may be a URL. Manifest and indexes are then copied once to the user's cache
(`resources.user_cache()/remote/`, about 100 bytes a sample), and tars are read by byte range.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.resources import user_cache
from onellm_dist.shards.format.index import SUFFIX, ShardIndex
from onellm_dist.shards.format.manifest import MANIFEST, SHARD_FOLDER, Manifest, ShardInfo
from onellm_dist.shards.format.valid_names import find_outside_link
from onellm_dist.shards.storage.paths import read_range
from onellm_dist.shards.storage.remote import RemoteFolder, is_url, write_cached

__all__ = [
    "MANIFEST",
    "SHARD_FOLDER",
    "Dataset",
    "Manifest",
    "ShardInfo",
    "explain_missing_dataset",
    "list_files",
    "open_dataset",
    "read_manifest",
    "refuse_outside_links",
]
_OPEN_INDEXES = 256


class Dataset:
    """An open dataset, made by `open_dataset`. It may be pickled (a loader worker opens it again).

    Args:
        root: the dataset's folder; for a remote dataset the folder in the user's cache that holds
            copies of its manifest and indexes.
        manifest: its manifest.
        remote: where a remote dataset lies.
    """

    def __init__(self, root: Path, manifest: Manifest, remote: RemoteFolder | None = None) -> None:
        self.root = root
        self.remote = remote
        self.location = remote.url if remote else str(root)
        """Path or URL, for messages."""
        self.manifest = manifest
        self.name = manifest.name
        self.modalities = manifest.modalities
        """What every sample has; what samples may have, if the dataset lists their media."""
        self.lists_media = manifest.lists_media
        """Whether each sample has media of its own, named in its `.json` and in the index."""
        splits: dict[str, list[ShardInfo]] = {}
        for shard in manifest.shards:
            splits.setdefault(shard.split, []).append(shard)
        self._splits = {split: tuple(shards) for split, shards in splits.items()}
        self._indexes: OrderedDict[str, ShardIndex] = OrderedDict()
        self._checked: dict[str, tuple[int, int, int]] = {}
        """Path of a shard to the stamp of its index file, for those that were found intact."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Dataset], tuple[Path, Manifest, RemoteFolder | None]]:
        """Pickle by the arguments, without the open indexes."""
        return Dataset, (self.root, self.manifest, self.remote)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in the manifest's order."""
        return tuple(self._splits)

    def shards(self, split: str = "train") -> tuple[ShardInfo, ...]:
        """Return the shards of a split, in the manifest's order.

        Raises:
            UsageError: the dataset has no such split.
        """
        if split not in self._splits:
            raise UsageError(
                f"dataset {self.location} has no split {split!r}.",
                "nothing can be read from it.",
                f"it has: {', '.join(self._splits) or 'none'}.",
            )
        return self._splits[split]

    def samples(self, split: str = "train") -> int:
        """Count the samples of a split."""
        return sum(s.samples for s in self.shards(split))

    def tar_path(self, shard: ShardInfo) -> Path:
        """Return where the shard's tar lies (of a remote dataset: would lie, beside its index)."""
        return self.root / shard.path

    def read_tar(self, shard: ShardInfo, start: int, end: int) -> bytes:
        """Read bytes start .. end - 1 of a shard's tar; fewer only if the tar ends before.

        Raises:
            OSError: they cannot be read.
        """
        if self.remote is not None:
            return self.remote.read(shard.path, start, min(end, shard.bytes))
        # A Path would cost as much as the reading.
        return read_range(f"{self.root}/{shard.path}", start, end)

    def index(self, shard: ShardInfo) -> ShardIndex:
        """Return the shard's index. The most recently used ones stay mapped.

        Raises:
            OneLLMError: the index is missing or damaged, or belongs to another tar than the one in
                the manifest or on disk.
        """
        with self._lock:
            index = self._indexes.get(shard.path)
            if index is None:
                index = self._indexes[shard.path] = self._open_index(shard)
                if len(self._indexes) > _OPEN_INDEXES:
                    self._indexes.popitem(last=False)
            else:
                self._indexes.move_to_end(shard.path)
            return index

    def _open_index(self, shard: ShardInfo) -> ShardIndex:
        tar = self.tar_path(shard)
        try:
            index = self._open_cached(shard) if self.remote else self._open_checked(shard)
            on_disk = shard.bytes if self.remote else tar.stat().st_size
        except OSError as error:
            how = f"{error.filename}: {error.strerror}" if error.strerror else error
            raise OneLLMError(
                f"dataset {self.name}, shard {shard.path}: {how}.",
                "no sample of this shard can be read.",
                "restore the file; a lost index is made again by: "
                f"{self._get_index_command(shard)}",
            ) from error
        except OneLLMError as error:
            raise OneLLMError(
                f"dataset {self.name}, shard {shard.path}: {error.what}",
                error.why,
                "make the index again (the tar is only read, and training resumes with the same "
                f"samples): {self._get_index_command(shard)}",
            ) from error
        indexed = (index.tar_sha256, index.samples, index.tar_bytes)
        if indexed != (shard.sha256, shard.samples, shard.bytes) or on_disk != shard.bytes:
            raise OneLLMError(
                f"dataset {self.name}, shard {shard.path}: tar, index and manifest do not belong "
                f"together (the tar has {on_disk} bytes, the index was made for {index.tar_bytes}, "
                f"the manifest says {shard.bytes}; SHA-256 {index.tar_sha256[:12]} in the index, "
                f"{shard.sha256[:12]} in the manifest).",
                "reading through a stale index would return other samples than requested.",
                f"see what differs: onellm shards verify {shlex.quote(self.location)}",
            )
        return index

    def _get_index_command(self, shard: ShardInfo) -> str:
        if self.remote is not None:
            return f"onellm shards index on a copy of {self.location}/{shard.path}; then upload it"
        return f"onellm shards index {shlex.quote(str(self.tar_path(shard)))}"

    def _open_checked(self, shard: ShardInfo) -> ShardIndex:
        """Open an index file; its columns are checked the first time that this object opens it."""
        path = self.root / f"{shard.path}{SUFFIX}"
        stat = path.stat()
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        index = ShardIndex(path, check=self._checked.get(shard.path) != stamp)
        self._checked[shard.path] = stamp
        return index

    def _open_cached(self, shard: ShardInfo) -> ShardIndex:
        """Open the cached copy of a remote index; a damaged or missing copy is fetched again."""
        assert self.remote is not None
        name = f"{shard.path}{SUFFIX}"
        with suppress(OneLLMError, FileNotFoundError):
            return self._open_checked(shard)
        size = self.remote.size(shard.path)
        if size != shard.bytes:
            raise OSError(
                f"{self.remote.url}/{shard.path} has {size} bytes, the manifest says {shard.bytes}"
            )
        self.remote.fetch(name, self.root / name)
        return self._open_checked(shard)

    def fingerprint(self) -> str:
        """Return the hex SHA-256 of the manifest.

        It is equal where name, modalities, order and bytes of all shards are equal.
        """
        return hashlib.sha256(self.manifest.to_bytes()).hexdigest()


def open_dataset(place: Path | str, *, follow_links: bool = False) -> Dataset:
    """Open a dataset: a folder, or the URL of one.

    Args:
        place: the folder or URL.
        follow_links: whether its tars and indexes may be links that lead out of the folder.

    Raises:
        UsageError: there is no dataset, or it is incomplete or has an unknown version, or a shard
            or index is missing or leads out of the folder. (A missing file of a remote dataset is
            found when its shard is first read, because listing a bucket takes minutes.)
    """
    if is_url(place):
        return _open_remote(str(place))
    path = Path(place)
    manifest = read_manifest(path)
    paths = [shard.path for shard in manifest.shards]
    listed, links = list_files(path, paths)
    missing = [p for shard in paths for p in (shard, shard + SUFFIX) if p not in listed]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        tars = any(p.endswith(".tar") for p in missing)
        raise UsageError(
            f"dataset {path}: its manifest lists files that do not exist: "
            f"{', '.join(missing[:3])}{more}.",
            "their samples would be lost silently.",
            "restore the tars or build the dataset again."
            if tars
            else f"make the indexes: onellm shards index {shlex.quote(str(path))}",
        )
    if not follow_links:
        refuse_outside_links(path, links)
    return Dataset(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a local dataset.

    Raises:
        UsageError: there is no dataset, or its manifest is not a valid one.
    """
    try:
        data = (path / MANIFEST).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: what cannot be a path
        raise explain_missing_dataset(path) from error
    return Manifest.from_bytes(data, path / MANIFEST)


_ALLOW_LINKS = (
    "copy the file there, or allow such links: data.follow_links=true in the recipe, "
    "--follow-links for onellm shards index, verify, stats and preview, follow_links=True in "
    "Python."
)


def refuse_outside_links(root: Path, paths: Iterable[str], *, remedy: str = _ALLOW_LINKS) -> None:
    """Refuse files of a dataset that lead out of its folder through links.

    Args:
        root: the dataset's folder, which may itself be reached through a link.
        paths: the files that are links or in folders that are.
        remedy: what the message says to do.

    Raises:
        UsageError: one does.
    """
    outside = find_outside_link(root, paths)
    if outside is not None:
        raise UsageError(
            f"dataset {root}: {outside} is a link that leads out of the folder, to "
            f"{(root / outside).resolve()}.",
            "a dataset reads and writes nothing outside its folder unless asked for.",
            remedy,
        )


def _open_remote(url: str) -> Dataset:
    remote = RemoteFolder(url)
    try:
        data = remote.read_file(MANIFEST)
    except OSError as error:
        raise UsageError(
            f"{remote.url}/{MANIFEST} cannot be read: {error}",
            "a dataset is a folder with a manifest.json.",
            "check the URL (data.root, data.mixture), the credentials and the endpoint.",
        ) from error
    manifest = Manifest.from_bytes(data, f"{remote.url}/{MANIFEST}")
    # Another manifest has other indexes.
    version = hashlib.sha256(remote.url.encode() + data).hexdigest()[:16]
    copies = user_cache() / "remote" / f"{manifest.name}-{version}"
    try:
        if not (copies / MANIFEST).is_file():
            copies.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            copies.mkdir(exist_ok=True)
            write_cached(copies / MANIFEST, data)
    except OSError as error:
        raise UsageError(
            f"{copies} cannot be written: {error.strerror or error}",
            "it holds copies of a remote dataset's indexes.",
            "set ONELLM_CACHE to a folder that all ranks share.",
        ) from error
    return Dataset(copies, manifest, remote)


def list_files(root: Path, shards: Iterable[str]) -> tuple[set[str], list[str]]:
    """List the files in the folders of shards.

    It takes one directory read a folder; one stat a shard would be slow on network disks.

    Args:
        root: the dataset's folder.
        shards: the paths of its shards.

    Returns:
        The relative paths of all files, and those that are links or in folders that are.
    """
    found, links = set[str](), list[str]()
    for folder in {path.rpartition("/")[0] for path in shards}:
        place, prefix = root / folder, f"{folder}/" if folder else ""
        if not os.path.isdir(place):
            continue
        through_link = any((root / p).is_symlink() for p in _list_folders(folder))
        with os.scandir(place) as entries:
            for entry in entries:
                found.add(prefix + entry.name)
                if through_link or entry.is_symlink():
                    links.append(prefix + entry.name)
    return found, links


def _list_folders(folder: str) -> list[str]:
    """Return a relative folder and those above it."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def explain_missing_dataset(path: Path) -> UsageError:
    """Make the error that says why `path`, which has no manifest, is not a dataset."""
    if not os.path.isdir(path):
        return UsageError(
            f"{path}: there is no such folder.",
            "a dataset is a folder with a manifest.json.",
            "check the path (data.root, data.mixture).",
        )
    below = sorted(p.parent.name for p in path.glob(f"[!.]*/{MANIFEST}"))
    if below:
        return UsageError(
            f"{path} holds {format_count(len(below), 'dataset')}: {', '.join(below)}.",
            "a mixture names datasets one by one.",
            f"name one, such as {path / below[0]}.",
        )
    if (path / SHARD_FOLDER).is_dir():
        return UsageError(
            f"{path} is an incomplete dataset: it has a {SHARD_FOLDER}/ folder and no {MANIFEST}.",
            "the manifest is written last, so the builder was stopped or is still running; its "
            "shards may be incomplete.",
            "wait for the builder, or remove the folder and build again.",
        )
    if any(path.glob("*.tar")) or any(path.glob("*/*.tar")):
        return UsageError(
            f"{path} holds tars and no {MANIFEST}.",
            "samples are found through an index beside each tar.",
            f"make the indexes: onellm shards index {shlex.quote(str(path))}",
        )
    return UsageError(
        f"{path} does not hold a dataset: it has no {MANIFEST}.",
        "nothing can be read from it.",
        "check the path, or build a dataset: onellm shards build --help",
    )
