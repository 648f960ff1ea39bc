"""Megatron-Energon's metadata (the files of version 7.4.1), so that its loader reads our shards.

    x.tar.idx               uint64: where each sample's first header lies, then the end
                            (the column `sample_start` of our index)
    .nv-meta/.info.json     samples a shard
    .nv-meta/split.yaml     shards of train, val, test
    .nv-meta/dataset.yaml   how samples are made ("cooked")
    .nv-meta/index.sqlite   where each sample and part lies, by key
    .nv-meta/index.uuid     made from the manifest, so that equal datasets have equal files

It also reads the splits of datasets that `energon prepare` was run on.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from braceexpand import braceexpand

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import unique_name
from onellm_dist.shards.format.dataset import (
    MANIFEST,
    Manifest,
    ShardInfo,
    refuse_outside_links,
)
from onellm_dist.shards.format.index import ShardIndex, get_index_path
from onellm_dist.shards.storage.paths import StoragePath, store_file, write_file

ENERGON_VERSION = "7.4.1"
META = ".nv-meta"
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
_MOST_NAMES = 100_000
"""Most tars that one entry of a split may stand for."""
_MOST_BRACES = 16
"""Most pairs of braces in such an entry."""
_TEMPORARY = ".making-"
"""Prefix of a folder where the database is made."""
_SPLITS = ("train", "val", "test")
"""Energon's own splits; they are listed even if they are empty."""
_TABLES = (
    "\nCREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, "
    "sample_index INTEGER NOT NULL,\n    byte_offset INTEGER, byte_size INTEGER);\n"
    "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, "
    "content_byte_offset INTEGER,\n    content_byte_size INTEGER);\n"
)
"""SQLite stores these texts as they are; another line break would change the file's bytes."""
_INDEXES = (
    "\nCREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);\n"
    "CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, "
    "content_byte_offset);\n"
    "CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index, part_name, "
    "content_byte_offset, content_byte_size);\n"
)


def write_energon(
    root: StoragePath, manifest: Manifest | None = None, scratch: Path | None = None
) -> None:
    """Write Energon's files into a dataset folder, in place of older ones.

    Tars are not read, only their indexes.

    Args:
        root: the dataset's folder.
        manifest: its manifest; default: read from the folder.
        scratch: a local folder where the database is made (290 bytes a sample of three parts, 370
            while it is indexed); default: in the dataset's own `.nv-meta/`, or for a remote dataset
            the system's folder for temporary files.

    Raises:
        UsageError: there is no dataset.
        OneLLMError: an index cannot be read, or the database cannot be written (the disk is full,
            or two samples have the same key).
    """
    if manifest is None:
        try:
            data = (root / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise UsageError(
                f"{root} does not hold a dataset.",
                "Energon's files describe one.",
                "check the path.",
            ) from None
        manifest = Manifest.from_bytes(data, Path(str(root / MANIFEST)))
    meta = root / META
    if isinstance(root, Path) and isinstance(meta, Path):
        refuse_outside_links(
            root,
            [META, *(f"{shard.path}.idx" for shard in manifest.shards)],
            remedy="the files would be written there: put a folder in place of the link.",
        )
        meta.mkdir(exist_ok=True)
        for leftover in meta.glob(f"{_TEMPORARY}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    where = scratch if scratch is not None else meta if isinstance(meta, Path) else None
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=where) as folder:
        try:
            _write_database(root, manifest.shards, Path(folder))
        except sqlite3.Error as error:
            raise OneLLMError(
                f"{meta / 'index.sqlite'} cannot be made in {folder}: {error}.",
                "Megatron-Energon finds samples in it (training here does not use it).",
                "make room (about 400 bytes a sample) and run the same command again, or do "
                "without (-o energon=false): what was built is kept.",
            ) from error
    _write_descriptions(meta, manifest)


def _write_descriptions(meta: StoragePath, manifest: Manifest) -> None:
    """Write the small files: splits, how samples are made, the dataset's id, sample counts."""
    splits: dict[str, list[str]] = {name: [] for name in _SPLITS}
    for shard in manifest.shards:
        splits.setdefault(shard.split, []).append(shard.path)
    info = {
        "energon_version": ENERGON_VERSION,
        "shard_counts": {s.path: s.samples for s in manifest.shards},
    }
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    parts = {"split_parts": splits, "exclude": []}
    identity = uuid.UUID(bytes=hashlib.sha256(manifest.to_bytes()).digest()[:16], version=4)
    write_file(meta / "split.yaml", yaml.safe_dump(parts, sort_keys=False).encode())
    write_file(meta / "dataset.yaml", yaml.safe_dump(dataset, sort_keys=False).encode())
    write_file(meta / "index.uuid", str(identity).encode())
    write_file(meta / ".info.json", json.dumps(info, indent=2).encode())


def _write_database(root: StoragePath, shards: Sequence[ShardInfo], scratch: Path) -> None:
    """Write index.sqlite (made locally, SQLite cannot write to stores) and the `.idx` files."""
    local = scratch / f"{unique_name()}.sqlite"
    with closing(sqlite3.connect(local)) as database:
        # After a crash the file is discarded, so nothing needs a journal.
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.executescript(_TABLES)
        for number, shard in enumerate(shards):
            tar = root / shard.path
            index = _open_index(tar, scratch)
            starts = index.sample_starts().astype("<u8").tobytes()
            write_file(tar.with_name(f"{tar.name}.idx"), starts)
            database.executemany(
                "INSERT INTO samples VALUES (?, ?, ?, ?, ?)", _list_samples(number, index)
            )
            database.executemany(
                "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", _list_parts(number, index)
            )
        database.commit()
        with _sort_in(scratch, database):
            database.executescript(_INDEXES)
            database.commit()
    store_file(local, root / META / "index.sqlite")


@contextmanager
def _sort_in(folder: Path, database: sqlite3.Connection) -> Iterator[None]:
    """Let SQLite sort large indexes in files of this folder instead of $TMPDIR.

    The setting holds for the whole process, so it is taken back.
    """
    text = str(folder).replace("'", "''")
    database.execute(f"PRAGMA temp_store_directory = '{text}'")
    try:
        yield
    finally:
        database.execute("PRAGMA temp_store_directory = ''")


def _open_index(tar: StoragePath, scratch: Path) -> ShardIndex:
    path = get_index_path(tar)
    if isinstance(path, Path):
        return ShardIndex(path)
    copy = scratch / "remote.index"
    copy.write_bytes(path.read_bytes())
    return ShardIndex(copy)


def _list_samples(number: int, index: ShardIndex) -> Iterator[tuple[int, str, int, int, int]]:
    starts = index.sample_starts().astype(np.int64)
    sizes = np.diff(starts).tolist()
    for row, (key, start, size) in enumerate(
        zip(index.keys(), starts.tolist(), sizes, strict=False)
    ):
        yield number, key, row, start, size


def _list_parts(number: int, index: ShardIndex) -> Iterator[tuple[int, int, str, int, int]]:
    for row in range(index.samples):
        for extension, location in index.parts(row).items():
            yield number, row, extension, location.offset, location.size


def read_energon_splits(root: Path) -> dict[str, str] | None:
    """Read the splits of a dataset that `energon prepare` was run on.

    Energon writes ranges of names as `shards/{000000..000009}.tar`.

    Returns:
        Tar (path relative to `root`) to split, without excluded tars; None if there is no
        `.nv-meta/split.yaml` (or `.json`).

    Raises:
        UsageError: the file cannot be read, or excludes single samples.
    """
    path = next(
        (p for p in (root / META / "split.yaml", root / META / "split.json") if p.is_file()), None
    )
    if path is None:
        return None
    try:
        content: Any = yaml.safe_load(path.read_bytes())
        excluded = {e for given in content.get("exclude") or [] for e in _expand(str(given))}
        splits = {
            tar: str(split)
            for split, tars in content["split_parts"].items()
            for given in tars
            for tar in _expand(str(given))
        }
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: {type(error).__name__}: {error}",
            "it says which tar belongs to which split.",
            "run `energon prepare` again.",
        ) from error
    if single := sorted(e for e in excluded if not e.endswith(".tar")):
        raise UsageError(
            f"{path} excludes {len(single)} single samples, of which {single[0]} is the first.",
            "tars are indexed as they are, and these samples would be trained on.",
            "write the tars again without them, or exclude whole tars.",
        )
    return {tar: split for tar, split in splits.items() if tar not in excluded}


def _expand(text: str) -> list[str]:
    """Expand the ranges and lists of names in braces.

    Raises:
        ValueError: they are too many names (a range of 10^10 would take all memory).
    """
    ranges = ((int(first), int(last)) for first, last in _RANGE.findall(text))
    product = math.prod(abs(last - first) + 1 for first, last in ranges)
    names = []
    if product <= _MOST_NAMES and text.count("{") <= _MOST_BRACES:
        names = list(islice(braceexpand(text), _MOST_NAMES + 1))
    if not 0 < len(names) <= _MOST_NAMES:
        raise ValueError(f"{text!r:.80} stands for too many names")
    return names
