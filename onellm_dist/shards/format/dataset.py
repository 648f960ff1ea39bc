"""The shard format: a dataset is a folder with `manifest.json`, tars, and an index beside each tar.

`shards/README.md` (top level) describes the format byte by byte. Opening a dataset reads the
manifest and lists the shard folders. An index is opened when a sample of its shard is read, so a
dataset of 10^8 samples opens in a fraction of a second.

The folder may be a URL. Manifest and indexes are then copied once to the user's cache
(`resources.user_cache()/remote/`, about 100 bytes a sample), and tars are read by byte range.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.resources import user_cache
from onellm_dist.shards.format.index import ShardIndex, get_index_path
from onellm_dist.shards.storage.paths import read_range
from onellm_dist.shards.storage.remote import RemoteFolder, is_url, write_cached

MANIFEST = "manifest.json"
FORMAT = "onellm-shards"
VERSION = 1
SHARD_FOLDER = "shards"
_OPEN_INDEXES = 256


@dataclass(frozen=True)
class ShardInfo:
    """One tar, as the manifest lists it."""

    path: str
    """Relative to the dataset's folder, with forward slashes."""
    split: str
    samples: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Hex digest of the tar."""

    @property
    def name(self) -> str:
        """The shard's name in sample ids and sidecar files.

        It is the path without `shards/` and `.tar`, with `__` for other slashes.
        """
        return self.path.removeprefix(f"{SHARD_FOLDER}/").removesuffix(".tar").replace("/", "__")


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, which a writer writes last: with it the dataset is complete."""

    name: str
    """The dataset's name: the first part of its samples' ids."""
    modalities: tuple[str, ...]
    """What every sample has, in this order; () is text alone."""
    text: tuple[str, ...]
    """Which of `.txt` and `.json` every sample has."""
    licence: str
    source: str
    """What made the dataset (`toyworld`, `folder`, `index`)."""
    shards: tuple[ShardInfo, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Anything else about the dataset (of the toy world: its attributes and their values)."""

    def to_bytes(self) -> bytes:
        """Make the JSON, one shard a line. Equal manifests have equal bytes."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "modalities": list(self.modalities),
            "text": list(self.text),
            "licence": self.licence,
            "source": self.source,
            "attributes": dict(self.attributes),
        }
        lines = [
            f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False, sort_keys=True)}"
            for k, v in head.items()
        ]
        shards = ",\n".join("    " + json.dumps(asdict(s), ensure_ascii=False) for s in self.shards)
        lines.append(f'  "shards": [\n{shards}\n  ]')
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: Path) -> Manifest:
        """Parse a manifest; `where` is its path for messages.

        Raises:
            UsageError: it is not a manifest, or has another version.
        """
        try:
            raw = json.loads(data)
            if raw["format"] != FORMAT:
                raise _make_manifest_error(
                    where, f"its format is {raw['format']!r}, not {FORMAT!r}"
                )
            if raw["version"] != VERSION:
                raise _make_manifest_error(
                    where, f"its version is {raw['version']}, this program reads {VERSION}"
                )
            return cls(
                raw["name"],
                tuple(raw["modalities"]),
                tuple(raw["text"]),
                raw["licence"],
                raw["source"],
                tuple(ShardInfo(**s) for s in raw["shards"]),
                raw.get("attributes", {}),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise _make_manifest_error(
                where, f"it cannot be read ({type(error).__name__}: {error})"
            ) from error


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
        splits: dict[str, list[ShardInfo]] = {}
        for shard in manifest.shards:
            splits.setdefault(shard.split, []).append(shard)
        self._splits = {split: tuple(shards) for split, shards in splits.items()}
        self._indexes: OrderedDict[str, ShardIndex] = OrderedDict()
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
            index = self._open_cached(shard) if self.remote else ShardIndex(get_index_path(tar))
            on_disk = shard.bytes if self.remote else tar.stat().st_size
        except OSError as error:
            how = f"{error.filename}: {error.strerror}" if error.strerror else error
            raise OneLLMError(
                f"dataset {self.name}, shard {shard.path}: {how}.",
                "no sample of this shard can be read.",
                "restore the file; a lost index is made again by: onellm shards index",
            ) from error
        indexed = (index.tar_sha256, index.samples, index.tar_bytes)
        if indexed != (shard.sha256, shard.samples, shard.bytes) or on_disk != shard.bytes:
            raise OneLLMError(
                f"dataset {self.name}, shard {shard.path}: tar, index and manifest do not belong "
                f"together (the tar has {on_disk} bytes, the index was made for {index.tar_bytes}, "
                f"the manifest says {shard.bytes}; SHA-256 {index.tar_sha256[:12]} in the index, "
                f"{shard.sha256[:12]} in the manifest).",
                "reading through a stale index would return other samples than requested.",
                f"see what differs: onellm shards verify {self.location}",
            )
        return index

    def _open_cached(self, shard: ShardInfo) -> ShardIndex:
        """Open the cached copy of a remote index; a damaged or missing copy is fetched again."""
        assert self.remote is not None
        name = str(get_index_path(Path(shard.path)))
        copy = self.root / name
        if copy.is_file():
            with suppress(OneLLMError):
                index = ShardIndex(copy)
                if index.is_body_intact():
                    return index
        size = self.remote.size(shard.path)
        if size != shard.bytes:
            raise OSError(
                f"{self.remote.url}/{shard.path} has {size} bytes, the manifest says {shard.bytes}"
            )
        self.remote.fetch(name, copy)
        return ShardIndex(copy)

    def fingerprint(self) -> str:
        """Return the hex SHA-256 of the manifest.

        It is equal where name, modalities, order and bytes of all shards are equal.
        """
        return hashlib.sha256(self.manifest.to_bytes()).hexdigest()


def open_dataset(place: Path | str) -> Dataset:
    """Open a dataset: a folder, or the URL of one.

    Raises:
        UsageError: there is no dataset, or it is incomplete or has an unknown version, or a shard
            or index is missing. (A missing file of a remote dataset is found when its shard is
            first read, because listing a bucket takes minutes.)
    """
    if is_url(place):
        return _open_remote(str(place))
    path = Path(place)
    try:
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise explain_missing_dataset(path) from error
    manifest = Manifest.from_bytes(data, path / MANIFEST)
    listed = _list_files(path, {str(PurePosixPath(s.path).parent) for s in manifest.shards})
    expected = [p for s in manifest.shards for p in (s.path, str(get_index_path(Path(s.path))))]
    missing = [p for p in expected if p not in listed]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        tars = any(p.endswith(".tar") for p in missing)
        raise UsageError(
            f"dataset {path}: its manifest lists files that do not exist: "
            f"{', '.join(missing[:3])}{more}.",
            "their samples would be lost silently.",
            "restore the tars or build the dataset again."
            if tars
            else f"make the indexes: onellm shards index {path}",
        )
    return Dataset(path, manifest)


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
    manifest = Manifest.from_bytes(data, Path(f"{remote.url}/{MANIFEST}"))
    # Another manifest has other indexes.
    version = hashlib.sha256(remote.url.encode() + data).hexdigest()[:16]
    copies = user_cache() / "remote" / f"{manifest.name}-{version}"
    try:
        if not (copies / MANIFEST).is_file():
            copies.mkdir(parents=True, exist_ok=True)
            write_cached(copies / MANIFEST, data)
    except OSError as error:
        raise UsageError(
            f"{copies} cannot be written: {error.strerror or error}",
            "it holds copies of a remote dataset's indexes.",
            "set ONELLM_CACHE to a folder that all ranks share.",
        ) from error
    return Dataset(copies, manifest, remote)


def _list_files(root: Path, folders: set[str]) -> set[str]:
    """List the relative paths of all files in some folders.

    It takes one directory read a folder; one stat a shard would be slow on network disks.
    """
    found: set[str] = set()
    for folder in folders:
        if (root / folder).is_dir():
            with os.scandir(root / folder) as entries:
                found.update(str(PurePosixPath(folder) / entry.name) for entry in entries)
    return found


def explain_missing_dataset(path: Path) -> UsageError:
    """Make the error that says why `path`, which has no manifest, is not a dataset."""
    if not path.is_dir():
        return UsageError(
            f"{path}: there is no such folder.",
            "a dataset is a folder with a manifest.json.",
            "check the path (data.root, data.mixture).",
        )
    below = sorted(p.parent.name for p in path.glob(f"*/{MANIFEST}"))
    if below:
        return UsageError(
            f"{path} holds {len(below)} datasets: {', '.join(below)}.",
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
            f"make the indexes: onellm shards index {path}",
        )
    return UsageError(
        f"{path} does not hold a dataset: it has no {MANIFEST}.",
        "nothing can be read from it.",
        "check the path, or build a dataset: onellm shards build --help",
    )


def _make_manifest_error(where: Path, how: str) -> UsageError:
    return UsageError(
        f"{where}: {how}.",
        "the manifest says which shards the dataset has.",
        "build the dataset again, or use the program version that made it.",
    )
