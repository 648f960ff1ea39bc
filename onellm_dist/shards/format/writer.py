"""Writes a dataset from one process: tars, an index beside each, the manifest last (the builder shares the work out instead).

Everything is written aside, synced and renamed, so a file under its final name is whole, and a folder with a manifest is a
whole dataset. Tars have a fixed time and owner: the same samples give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.files import STAGED, sync, write_atomic
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.modalities import Modality, get_modality
from onellm_dist.shards.format.dataset import (
    MANIFEST,
    SHARD_FOLDER,
    Dataset,
    Manifest,
    ShardInfo,
    open_dataset,
)
from onellm_dist.shards.format.index import SUFFIX
from onellm_dist.shards.format.tar_writer import ShardWriter
from onellm_dist.shards.format.tars import split_name

MAX_SAMPLES = 10_000
MAX_BYTES = 1 << 30
_NAME = re.compile(r"\w[\w.-]*")
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_OURS = re.compile(
    rf"[A-Za-z0-9_-]+-\d{{6}}(?:_\d{{2}})?\.tar(?:{re.escape(SUFFIX)})?(?:{re.escape(STAGED)})?"
)


def check_name(name: str) -> None:
    """Raises UsageError where a dataset cannot have this name."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"dataset name {name!r} has other characters than letters, digits and ._-, or begins with one of . and -",
            "it is part of every sample's id.",
            "choose another.",
        )


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
        check_name(name)
        if max_samples < 1 or max_bytes < 1:
            raise UsageError(
                f"max_samples={max_samples}, max_bytes={max_bytes}: both must be at least 1.",
                "a shard holds samples.",
                "raise them.",
            )
        self.root, self.name, self.modalities = Path(root), name, tuple(modalities)
        self._checks = [get_modality(m) for m in self.modalities]
        self._licence, self._source, self._attributes = licence, source, dict(attributes or {})
        self._max_samples, self._max_bytes = max_samples, max_bytes
        refuse_occupied(self.root)
        (self.root / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        self._open: dict[str, ShardWriter] = {}
        self._shards: list[ShardInfo] = []
        self._counts: dict[str, int] = {}
        self._keys: set[str] = set()
        self._text = set(TEXT_EXTENSIONS)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        if shard is not None and (
            shard.samples >= self._max_samples or shard.content + size > self._max_bytes
        ):
            self._shards.append(shard.close())
            shard = None
        if shard is None:
            number = self._counts.get(split, 0)
            self._counts[split] = number + 1
            shard = self._open[split] = self._new_shard(split, number)
        shard.add(key, parts)
        self._keys.add(key)
        self._text &= parts.keys()

    def _new_shard(self, split: str, number: int) -> ShardWriter:
        path = shard_path(split, number)
        return ShardWriter(self.root / path, path=path, split=split)

    def _check(self, split: str, key: str, parts: Mapping[str, bytes]) -> None:
        where = f"dataset {self.name}, key {key!r}"
        if not _SPLIT.fullmatch(split):
            raise SampleError(
                f"{where}: split {split!r} has other characters than letters, digits, _ and -.",
                "it names the tar.",
                "rename it.",
            )
        check_names(where, key, parts)
        if key in self._keys:
            raise SampleError(
                f"{where} was written before.",
                "keys are unique in a dataset, over all its splits.",
                "give each sample its own key.",
            )
        check_parts(where, self._checks, parts)

    def finish(self) -> Dataset:
        """Closes the shards, writes the manifest, and opens the dataset.

        Raises:
            UsageError: no sample was added.
        """
        if not self._keys:
            self.abandon()
            raise UsageError(
                f"dataset {self.name} ({self.root}) got no sample.",
                "an empty dataset cannot be read.",
                "check the inputs.",
            )
        self._shards.extend(shard.close() for shard in self._open.values())
        self._open = {}
        sync(self.root / SHARD_FOLDER)
        manifest = Manifest(
            self.name,
            self.modalities,
            tuple(e for e in TEXT_EXTENSIONS if e in self._text),
            self._licence,
            self._source,
            tuple(sorted(self._shards, key=lambda s: s.path)),
            self._attributes,
        )
        write_atomic(self.root / MANIFEST, manifest.to_bytes())
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
            f"{root} already holds a dataset.",
            "it is not overwritten unless asked for.",
            "choose another output, or give --overwrite.",
        )
    if names == [SHARD_FOLDER] and all(
        _OURS.fullmatch(p.name) for p in (root / SHARD_FOLDER).iterdir()
    ):
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


def shard_path(split: str, number: int, piece: int = 0) -> str:
    """A shard's path in the dataset; `piece`: where `max_bytes` cut a shard of the builder's plan in several."""
    return f"{SHARD_FOLDER}/{split}-{number:06d}{f'_{piece:02d}' if piece else ''}.tar"


def check_names(where: str, key: str, parts: Collection[str]) -> None:
    """Raises SampleError where a WebDataset tar cannot hold this key with these extensions."""
    if not parts:
        raise SampleError(
            f"{where} has no parts.", "a sample of a tar is its files.", "give it at least one."
        )
    components = key.split("/")
    if not _printable(key) or key.startswith("__") or any(c in ("", ".", "..") for c in components):
        raise SampleError(
            f"{where}: no key of a WebDataset tar.",
            "readers would skip it or read another name.",
            "use plain relative names.",
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


def check_parts(where: str, modalities: Iterable[Modality], parts: Collection[str]) -> None:
    """Raises SampleError where a modality lacks a part."""
    for modality in modalities:
        try:
            modality.match(set(parts))
        except SampleError as error:
            raise SampleError(f"{where}: {error.what}", error.why, error.do) from error
