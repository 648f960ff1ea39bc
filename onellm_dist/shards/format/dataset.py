"""The shard format: a dataset is a folder with `manifest.json`, tars, and an index beside each tar.

`shards/README.md` (top level) has the format byte by byte. Opening reads the manifest and lists the shard folders; an
index is opened when a sample of its shard is asked for, so a dataset of 10^8 samples opens in a fraction of a second.

The folder may be a URL: manifest and indexes are then copied once to the user's cache (`resources.user_cache()/remote/`,
about 100 bytes a sample), tars are read by byte range.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.resources import user_cache
from onellm_dist.shards.format.index import ShardIndex, get_index_path, read_range
from onellm_dist.shards.storage.remote import RemoteFolder, is_url, write_copy

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
    sha256: str

    @property
    def name(self) -> str:
        """The shard's name in sample ids and side files: its path without `shards/` and `.tar`, with `__` for other slashes."""
        return self.path.removeprefix(f"{SHARD_FOLDER}/").removesuffix(".tar").replace("/", "__")


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, the last file that a writer writes."""

    name: str
    """The dataset's name: the first part of its samples' ids."""
    modalities: tuple[str, ...]
    """Every sample has exactly these, in this order; () is text only."""
    text: tuple[str, ...]
    """Which of `.txt` and `.json` every sample has."""
    licence: str
    source: str
    """What made the dataset (`toyworld`, `folder`, `index`)."""
    shards: tuple[ShardInfo, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the source tells about the dataset (toy world: its attributes and their values)."""

    def to_bytes(self) -> bytes:
        """JSON, one shard a line; equal manifests have equal bytes."""
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
        """Parses a manifest.

        Raises:
            UsageError: not a manifest, or of another version.
        """
        try:
            raw = json.loads(data)
            if raw["format"] != FORMAT:
                raise _bad_manifest(where, f"its format is {raw['format']!r}, not {FORMAT!r}")
            if raw["version"] != VERSION:
                raise _bad_manifest(
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
            raise _bad_manifest(
                where, f"it cannot be read ({type(error).__name__}: {error})"
            ) from error


class Dataset:
    """An open dataset. Made by `open_dataset`; may be pickled (a loader worker opens it again).

    Args:
        root: its folder; of a remote one, the folder in the user's cache that holds copies of its manifest and indexes.
        remote: where a remote one really lies.
    """

    def __init__(self, root: Path, manifest: Manifest, remote: RemoteFolder | None = None) -> None:
        self.root = root
        self.remote = remote
        self.location = remote.url if remote else str(root)
        """Its path or URL, for messages."""
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
        return Dataset, (self.root, self.manifest, self.remote)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the manifest's order."""
        return tuple(self._splits)

    def shards(self, split: str = "train") -> tuple[ShardInfo, ...]:
        """The shards of a split, in the manifest's order.

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
        """Samples of a split."""
        return sum(s.samples for s in self.shards(split))

    def tar_path(self, shard: ShardInfo) -> Path:
        """Where the shard's tar lies; of a remote dataset, where it would lie beside its index."""
        return self.root / shard.path

    def read_tar(self, shard: ShardInfo, start: int, end: int) -> bytes:
        """Bytes start .. end - 1 of a shard's tar; fewer only where the tar ends before.

        Raises:
            OSError: they cannot be read.
        """
        if self.remote is not None:
            return self.remote.read(shard.path, start, min(end, shard.bytes))
        return read_range(
            f"{self.root}/{shard.path}", start, end
        )  # a Path costs as much as the reading

    def index(self, shard: ShardInfo) -> ShardIndex:
        """The shard's index; the most recently used ones stay mapped.

        Raises:
            OneLLMError: the index is missing, damaged, or of another tar than the manifest's or the one on disk.
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
            index, on_disk = (
                (self._mirrored(shard), shard.bytes)
                if self.remote
                else (ShardIndex(get_index_path(tar)), tar.stat().st_size)
            )
        except OSError as error:
            raise OneLLMError(
                f"dataset {self.name}, shard {shard.path}: {f'{error.filename}: {error.strerror}' if error.strerror else error}.",
                "no sample of this shard can be read.",
                "restore the file; a lost index is made again by: onellm shards index",
            ) from error
        if (index.tar_sha256, index.samples, index.tar_bytes) != (
            shard.sha256,
            shard.samples,
            shard.bytes,
        ) or on_disk != shard.bytes:
            raise OneLLMError(
                f"dataset {self.name}, shard {shard.path}: tar, index and manifest are not of one piece (the tar has {on_disk} bytes, "
                f"the index was made for {index.tar_bytes}, the manifest says {shard.bytes}; "
                f"SHA-256 {index.tar_sha256[:12]} in the index, {shard.sha256[:12]} in the manifest).",
                "reading through a stale index would give other samples than asked for.",
                f"see what differs: onellm shards verify {self.location}",
            )
        return index

    def _mirrored(self, shard: ShardInfo) -> ShardIndex:
        """A remote shard's index, from its copy; a copy that is damaged is fetched again."""
        assert self.remote is not None
        name = str(get_index_path(Path(shard.path)))
        copy = self.root / name
        if copy.is_file():
            try:
                index = ShardIndex(copy)
                if index.body_is_whole():
                    return index
            except OneLLMError:
                pass
        size = self.remote.size(shard.path)
        if size != shard.bytes:
            raise OSError(
                f"{self.remote.url}/{shard.path} has {size} bytes, the manifest says {shard.bytes}"
            )
        self.remote.fetch(name, copy)
        return ShardIndex(copy)

    def fingerprint(self) -> str:
        """Hex SHA-256 of the manifest: equal where name, modalities, order and bytes of all shards are equal."""
        return hashlib.sha256(self.manifest.to_bytes()).hexdigest()


def open_dataset(place: Path | str) -> Dataset:
    """Opens a dataset folder, or a URL of one.

    Raises:
        UsageError: no dataset there, a half-written one, an unknown version, or a shard or index is missing (of a remote
            one, that is found when the shard is first read: listing a bucket takes minutes).
    """
    if is_url(place):
        return _open_remote(str(place))
    path = Path(place)
    try:
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise no_dataset(path) from error
    manifest = Manifest.from_bytes(data, path / MANIFEST)
    listing = _listing(path, {str(PurePosixPath(s.path).parent) for s in manifest.shards})
    missing = [
        p
        for s in manifest.shards
        for p in (s.path, str(get_index_path(Path(s.path))))
        if p not in listing
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        tars = any(p.endswith(".tar") for p in missing)
        raise UsageError(
            f"dataset {path}: its manifest lists files that are not there: {', '.join(missing[:3])}{more}.",
            "samples would be lost without a word.",
            "restore the tars or build the dataset again."
            if tars
            else f"make the indexes: onellm shards index {path}",
        )
    return Dataset(path, manifest)


def _open_remote(url: str) -> Dataset:
    remote = RemoteFolder(url)
    try:
        data = remote.read_whole(MANIFEST)
    except OSError as error:
        raise UsageError(
            f"{remote.url}/{MANIFEST} cannot be read: {error}",
            "a dataset is a folder with a manifest.json.",
            "check the URL (data.root, data.mixture), the credentials and the endpoint.",
        ) from error
    where = Path(f"{remote.url}/{MANIFEST}")
    manifest = Manifest.from_bytes(data, where)
    version = hashlib.sha256(remote.url.encode() + data).hexdigest()[
        :16
    ]  # another manifest has other indexes
    mirror = user_cache() / "remote" / f"{manifest.name}-{version}"
    try:
        if not (mirror / MANIFEST).is_file():
            mirror.mkdir(parents=True, exist_ok=True)
            write_copy(mirror / MANIFEST, data)
    except OSError as error:
        raise UsageError(
            f"{mirror} cannot be written: {error.strerror or error}",
            "copies of a remote dataset's indexes lie there.",
            "set ONELLM_CACHE to a folder that all ranks share.",
        ) from error
    return Dataset(mirror, manifest, remote)


def _listing(root: Path, folders: set[str]) -> set[str]:
    """Relative paths of all files in these folders: one directory read each, where a stat a shard is slow on network disks."""
    found: set[str] = set()
    for folder in folders:
        if (root / folder).is_dir():
            with os.scandir(root / folder) as entries:
                found.update(str(PurePosixPath(folder) / entry.name) for entry in entries)
    return found


def no_dataset(path: Path) -> UsageError:
    """Why `path`, which has no manifest, is no dataset."""
    if not path.is_dir():
        return UsageError(
            f"{path}: there is no such folder.",
            "a dataset is a folder with a manifest.json.",
            "check the path (data.root, data.mixture).",
        )
    below = sorted(p.parent.name for p in path.glob(f"*/{MANIFEST}"))
    if below:
        return UsageError(
            f"{path} is not one dataset but holds {len(below)}: {', '.join(below)}.",
            "a mixture names datasets one by one.",
            f"name one, such as {path / below[0]}.",
        )
    if (path / SHARD_FOLDER).is_dir():
        return UsageError(
            f"{path} is a half-written dataset: it has a {SHARD_FOLDER}/ folder and no {MANIFEST}.",
            "the manifest is written last, so the builder was stopped or is still running; its shards may be incomplete.",
            "wait for the builder, or remove the folder and build again.",
        )
    if any(path.glob("*.tar")) or any(path.glob("*/*.tar")):
        return UsageError(
            f"{path} holds tars and no {MANIFEST}.",
            "samples are found through an index beside each tar.",
            f"make it: onellm shards index {path}",
        )
    return UsageError(
        f"{path} holds no dataset: it has no {MANIFEST}.",
        "nothing can be read from it.",
        "check the path, or build one: onellm shards build --help",
    )


def _bad_manifest(where: Path, how: str) -> UsageError:
    return UsageError(
        f"{where}: {how}.",
        "the manifest says which shards the dataset has.",
        "build the dataset again, or use the program version that made it.",
    )
