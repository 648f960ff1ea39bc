"""Write a dataset from one process: tars, an index beside each, and the manifest last.

(The builder shares the same work among processes.) Every file is written under a temporary name,
forced to the disk and renamed, so a file under its final name is complete, and so is a folder with
a manifest. Tars have a fixed time and owner: the same samples give the same bytes.
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
from onellm_dist.shards.format.valid_names import check_name, check_names, is_split_name

MAX_SAMPLES = 10_000
"""Most samples a shard, by default."""
MAX_BYTES = 1 << 30
"""Most bytes of content a shard, by default."""
_SHARD_FILE = re.compile(
    rf"[A-Za-z0-9_-]+-\d{{6}}(?:_\d{{2}})?\.tar(?:{re.escape(SUFFIX)})?"
    rf"(?:(?:\.[\w.-]+)?{re.escape(STAGED)})?"
)
"""A file that a writer of this program makes, complete or temporary."""


class DatasetWriter:
    """Writes one dataset folder.

    It is a context manager: leaving it writes the manifest, leaving it by an error does not.

        with DatasetWriter(Path("cats"), name="cats", modalities=("image",)) as writer:
            writer.add("train", "cat-0001", {"jpg": jpeg_bytes, "txt": b"a black cat"})

    Args:
        root: the folder; it must be absent or empty.
        name: the dataset's name in sample ids; letters, digits and `._-`.
        modalities: what every sample has; () is text alone. If `attributes` has `media.LISTED`,
            what samples may have: each lists its media.
        licence: goes to the manifest.
        source: what makes the dataset; goes to the manifest.
        attributes: anything else for the manifest (JSON values).
        max_samples: a shard is closed when it has this many samples.
        max_bytes: a shard is closed when the next sample would take its content beyond this.

    Raises:
        UsageError: the folder already holds something.
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
        self.root = Path(root)
        self.name = name
        self.modalities = tuple(modalities)
        self._lists_media = (attributes or {}).get("media") == "listed"
        self._checks = [] if self._lists_media else [get_modality(m) for m in self.modalities]
        self._licence = licence
        self._source = source
        self._attributes = dict(attributes or {})
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        refuse_occupied(self.root)
        (self.root / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        self._open: dict[str, ShardWriter] = {}
        self._shards: list[ShardInfo] = []
        self._counts: dict[str, int] = {}
        self._keys: set[str] = set()
        self._text = set(TEXT_EXTENSIONS)

    def __enter__(self) -> DatasetWriter:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the dataset, or after an error abandon it."""
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def add(self, split: str, key: str, parts: Mapping[str, bytes]) -> None:
        """Append one sample.

        Args:
            split: "train" or any other name.
            key: unique in the dataset, without a dot behind its last slash (WebDataset cuts names
                at the first dot).
            parts: lower-case extension to content; it must have what the modalities need.

        Raises:
            SampleError: a WebDataset tar cannot hold the key or an extension, the key was used
                before, or a part is missing.
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
            shard = self._open[split] = self._open_shard(split)
        shard.add(key, parts)
        self._keys.add(key)
        self._text &= parts.keys()

    def _open_shard(self, split: str) -> ShardWriter:
        number = self._counts.get(split, 0)
        self._counts[split] = number + 1
        path = get_shard_path(split, number)
        media_of = self.modalities if self._lists_media else None
        return ShardWriter(self.root / path, path=path, split=split, media_of=media_of)

    def _check(self, split: str, key: str, parts: Mapping[str, bytes]) -> None:
        where = f"dataset {self.name}, key {key!r}"
        if not is_split_name(split):
            raise SampleError(
                f"{where}: split {split!r} has characters other than letters, digits, _ and -.",
                "it is part of the name of a tar.",
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
        """Close the shards, write the manifest, and open the dataset.

        Raises:
            UsageError: no sample was added.
        """
        if not self._keys:
            self.abandon()
            raise UsageError(
                f"dataset {self.name} ({self.root}) received no sample.",
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
        write_atomic(self.root / MANIFEST, manifest.to_file())
        return open_dataset(self.root)

    def abandon(self) -> None:
        """Remove the open shards. The folder keeps no manifest and is recognised as incomplete."""
        for shard in self._open.values():
            shard.abandon()
        self._open = {}


def refuse_occupied(root: Path) -> None:
    """Check that `root` is absent or an empty folder.

    Raises:
        UsageError: it is not; the message says what lies there.
    """
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
        _SHARD_FILE.fullmatch(p.name) for p in (root / SHARD_FOLDER).iterdir()
    ):
        raise UsageError(
            f"{root} is an incomplete dataset ({SHARD_FOLDER}/ without {MANIFEST}).",
            "its builder was stopped, or is still running.",
            "remove the folder, or give --overwrite, or choose another output.",
        )
    raise UsageError(
        f"{root} is not empty ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}).",
        "what lies there is not a dataset of this program and would be mixed with it.",
        "choose an empty or new folder.",
    )


def get_shard_path(split: str, number: int, piece: int = 0) -> str:
    """Return the path of a shard in the dataset.

    Args:
        split: its split.
        number: its number in the split.
        piece: which piece it is of a planned shard that `max_bytes` cut into several.
    """
    suffix = f"_{piece:02d}" if piece else ""
    return f"{SHARD_FOLDER}/{split}-{number:06d}{suffix}.tar"


def check_parts(where: str, modalities: Iterable[Modality], parts: Collection[str]) -> None:
    """Check that the parts are what the modalities need.

    Raises:
        SampleError: a part is missing; `where` begins the message.
    """
    for modality in modalities:
        try:
            modality.match(set(parts))
        except SampleError as error:
            raise SampleError(f"{where}: {error.what}", error.why, error.do) from error
