"""Writes a dataset: tars by webdataset's own writer, an index beside each, the manifest last.

Everything is written aside, synced and renamed, so a file under its final name is whole, and a folder with a manifest is a
whole dataset. Tars have a fixed time and owner: the same samples give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from webdataset.writer import TarWriter

from onellm_dist.errors import SampleError, UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.shards.files import ASIDE, aside, sync_folder, write_whole
from onellm_dist.shards.format import MANIFEST, SHARD_FOLDER, TEXT_EXTENSIONS, Dataset, Manifest, ShardInfo, open_dataset
from onellm_dist.shards.index import SUFFIX, IndexRows, PartLocation, pack_index, text_length, write_index
from onellm_dist.shards.tars import BLOCK, split_name

MAX_SAMPLES = 10_000
MAX_BYTES = 1 << 30
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_OURS = re.compile(rf"[A-Za-z0-9_-]+-\d{{6}}\.tar(?:{re.escape(SUFFIX)})?(?:{re.escape(ASIDE)})?")


class DatasetWriter:
    """Writes one dataset folder. A context manager: leaving it writes the manifest, leaving it by an error does not.

        with DatasetWriter(Path("cats"), name="cats", modalities=("image",)) as writer:
            writer.add("train", "cat-0001", {"jpg": jpeg_bytes, "txt": b"a black cat"})

    Args:
        root: the folder; it must not exist or be empty.
        name: the dataset's name in sample ids; letters, digits and `._-`.
        modalities: what every sample has; () is text only.
        licence: goes to the manifest.
        source: what makes the dataset, goes to the manifest.
        attributes: anything else for the manifest (JSON values).
        max_samples, max_bytes: a shard is closed when it has this many samples, or when the next sample would take the
            parts' bytes beyond `max_bytes`.

    Raises:
        UsageError: the folder holds something already.
    """

    def __init__(
        self,
        root: Path,
        *,
        name: str,
        modalities: tuple[str, ...],
        licence: str = "unknown",
        source: str = "",
        attributes: Mapping[str, Any] | None = None,
        max_samples: int = MAX_SAMPLES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if not re.fullmatch(r"[\w][\w.-]*", name):
            raise UsageError(
                f"dataset name {name!r} has other characters than letters, digits and ._-",
                "it is part of every sample's id.",
                "choose another.",
            )
        if max_samples < 1 or max_bytes < 1:
            raise UsageError(
                f"max_samples={max_samples}, max_bytes={max_bytes}: both must be at least 1.", "a shard holds samples.", "raise them."
            )
        self.root, self.name, self.modalities = Path(root), name, tuple(modalities)
        self._checks = [get_modality(m) for m in self.modalities]
        self._licence, self._source, self._attributes = licence, source, dict(attributes or {})
        self._max_samples, self._max_bytes = max_samples, max_bytes
        refuse_occupied(self.root)
        (self.root / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        self._open: dict[str, _ShardWriter] = {}
        self._shards: list[ShardInfo] = []
        self._counts: dict[str, int] = {}
        self._keys: set[str] = set()
        self._text = set(TEXT_EXTENSIONS)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def add(self, split: str, key: str, parts: Mapping[str, bytes]) -> None:
        """Appends one sample.

        Args:
            split: "train" or any other name.
            key: unique in the dataset, no dot behind its last slash (WebDataset cuts names at the first dot).
            parts: lower-case extension to content; it must have what the modalities need.

        Raises:
            SampleError: a key or extension that a WebDataset tar cannot hold, a key used before, or a missing part.
        """
        self._check(split, key, parts)
        size = sum(len(p) for p in parts.values())
        shard = self._open.get(split)
        if shard is not None and (shard.samples >= self._max_samples or shard.content + size > self._max_bytes):
            self._shards.append(shard.close())
            shard = None
        if shard is None:
            number = self._counts.get(split, 0)
            self._counts[split] = number + 1
            shard = self._open[split] = _ShardWriter(self.root, f"{SHARD_FOLDER}/{split}-{number:06d}.tar", split)
        shard.add(key, parts)
        self._keys.add(key)
        self._text &= parts.keys()

    def _check(self, split: str, key: str, parts: Mapping[str, bytes]) -> None:
        where = f"dataset {self.name}, key {key!r}"
        if not _SPLIT.fullmatch(split):
            raise SampleError(
                f"{where}: split {split!r} has other characters than letters, digits, _ and -.", "it names the tar.", "rename it."
            )
        if not parts:
            raise SampleError(f"{where} has no parts.", "a sample of a tar is its files.", "give it at least one.")
        components = key.split("/")
        if not _printable(key) or key.startswith("__") or any(c in ("", ".", "..") for c in components):
            raise SampleError(
                f"{where}: no key of a WebDataset tar.", "readers would skip it or read another name.", "use plain relative names."
            )
        for extension in parts:
            if (
                not extension
                or split_name(f"{key}.{extension}") != (key, extension)
                or extension.startswith(("_", "."))
                or not _printable(extension)
            ):
                raise SampleError(
                    f"{where}, part {extension!r}: a reader of the tar would not find it under this name.",
                    "a key has no dot behind its last slash; an extension is lower-case and starts with a letter or digit.",
                    "rename it (a dot in a key may become _).",
                )
        if key in self._keys:
            raise SampleError(
                f"{where} was written before.", "keys are unique in a dataset, over all its splits.", "give each sample its own key."
            )
        for modality in self._checks:
            try:
                modality.match(set(parts))
            except SampleError as error:
                raise SampleError(f"{where}: {error.what}", error.why, error.do) from error

    def finish(self) -> Dataset:
        """Closes the shards, writes the manifest, and opens the dataset.

        Raises:
            UsageError: no sample was added.
        """
        if not self._keys:
            self.abandon()
            raise UsageError(f"dataset {self.name} ({self.root}) got no sample.", "an empty dataset cannot be read.", "check the inputs.")
        self._shards.extend(shard.close() for shard in self._open.values())
        self._open = {}
        sync_folder(self.root / SHARD_FOLDER)
        manifest = Manifest(
            self.name, self.modalities, tuple(e for e in TEXT_EXTENSIONS if e in self._text), self._licence, self._source,
            tuple(sorted(self._shards, key=lambda s: s.path)), self._attributes,
        )  # fmt: skip
        write_whole(self.root / MANIFEST, manifest.to_bytes())
        return open_dataset(self.root)

    def abandon(self) -> None:
        """Drops the open shards; the folder stays without a manifest and is recognised as half-written."""
        for shard in self._open.values():
            shard.abandon()
        self._open = {}


def refuse_occupied(root: Path) -> None:
    """Raises UsageError where `root` is not absent or an empty folder; says what lies there."""
    if not root.exists():
        return
    if not root.is_dir():
        raise UsageError(f"{root} is a file.", "a dataset is a folder.", "choose another output.")
    names = sorted(p.name for p in root.iterdir())
    if not names:
        return
    if MANIFEST in names:
        raise UsageError(
            f"{root} already holds a dataset.", "it is not overwritten unless asked for.", "choose another output, or give --overwrite."
        )
    if names == [SHARD_FOLDER] and all(_OURS.fullmatch(p.name) for p in (root / SHARD_FOLDER).iterdir()):
        raise UsageError(
            f"{root} is a half-written dataset ({SHARD_FOLDER}/ without {MANIFEST}).",
            "its builder was stopped, or is still running.",
            "remove the folder, or give --overwrite, or choose another output.",
        )
    raise UsageError(
        f"{root} is not empty ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}).",
        "what lies there is no dataset of this program and would be mixed with it.",
        "choose an empty or new folder.",
    )


def _printable(text: str) -> bool:
    """UTF-8 (a file's name need not be) without control characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return _CONTROL.search(text) is None


class _Hashed:
    """The file a tar is written to, and the SHA-256 of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.bytes, self.dropped = file, hashlib.sha256(), 0, False

    def write(self, data: bytes) -> int:
        if self.dropped:
            return len(data)
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)


class _ShardWriter:
    """One tar and its index."""

    def __init__(self, root: Path, path: str, split: str) -> None:
        self.path, self.split, self.target = path, split, root / path
        self.samples = self.content = 0
        self._rows = IndexRows()
        self._file = aside(self.target).open("wb")
        self._stream = _Hashed(self._file)
        # webdataset 1.0.2 ignores `format` and writes tarfile's default (PAX); long or non-ASCII names take extra headers.
        self._tar = TarWriter(self._stream, user="onellm", group="onellm", mtime=0, compress=False, encoder=False)

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        tar, start, places = self._tar.tarstream, self._tar.tarstream.offset, {}
        for extension in sorted(parts):
            content = parts[extension]
            # One part a call gives the bytes of one call, and tells where the content lies.
            self._tar.write({"__key__": key, extension: content})
            padded = -(-len(content) // BLOCK) * BLOCK
            places[extension] = PartLocation(tar.offset - padded, len(content), zlib.crc32(content))
        tar.members = []  # or every header stays in memory until the shard is closed
        self._rows.add(key, start, places, text_length(parts.get("txt"), parts.get("json")))
        self.samples += 1
        self.content += sum(len(p) for p in parts.values())

    def close(self) -> ShardInfo:
        end = self._tar.tarstream.offset
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        size, digest = self._stream.bytes, self._stream.digest.hexdigest()
        write_index(self.target, pack_index(self._rows, tar_name=self.target.name, tar_bytes=size, tar_sha256=digest, end=end))
        aside(self.target).replace(self.target)
        return ShardInfo(self.path, self.split, self.samples, size, digest)

    def abandon(self) -> None:
        self._stream.dropped = True  # closing the tar would write its end, perhaps onto a full disk
        self._tar.close()
        self._file.close()
        aside(self.target).unlink(missing_ok=True)
