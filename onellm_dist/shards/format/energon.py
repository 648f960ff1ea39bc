"""Megatron-Energon's metadata (version 7.4.1's files), so that its loader reads our shards; and the splits of sets it prepared.

x.tar.idx               uint64: where each sample's first header lies, then the end: our index's column `sample_start`
.nv-meta/.info.json     samples a shard         .nv-meta/split.yaml    shards of train, val, test
.nv-meta/dataset.yaml   how samples are cooked  .nv-meta/index.sqlite  where each sample and part lies, by key
.nv-meta/index.uuid     here made from the manifest, so that equal datasets have equal files
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from braceexpand import braceexpand

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import unique_name
from onellm_dist.shards.format.dataset import MANIFEST, Manifest, ShardInfo
from onellm_dist.shards.format.index import ShardIndex
from onellm_dist.shards.storage.paths import StoragePath, put, write

ENERGON_VERSION = "7.4.1"
META = ".nv-meta"
_MAKING = ".making-"
_SPLITS = ("train", "val", "test")
"""Energon's own; they are named even where they are empty."""
_TABLES = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
    byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER,
    content_byte_size INTEGER);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


def write_energon(
    root: StoragePath, manifest: Manifest | None = None, scratch: Path | None = None
) -> None:
    """Writes Energon's files into a dataset folder; older ones are replaced. Tars are not read, only their indexes.

    Args:
        manifest: the dataset's; read from the folder where not given.
        scratch: a local folder where the database is made (290 bytes a sample of three parts, 370 while it is indexed); where not
            given one in the dataset's own `.nv-meta/`, or for a remote dataset the system's for temporary files.

    Raises:
        UsageError: there is no dataset.
        OneLLMError: an index cannot be read, or the database not be written (the disk is full, two samples have one key).
    """
    if manifest is None:
        try:
            data = (root / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise UsageError(
                f"{root} holds no dataset.", "Energon's files describe one.", "check the path."
            ) from None
        manifest = Manifest.from_bytes(data, Path(str(root / MANIFEST)))
    meta = root / META
    if isinstance(meta, Path):
        meta.mkdir(exist_ok=True)
        for left in meta.glob(f"{_MAKING}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    where = scratch if scratch is not None else meta if isinstance(meta, Path) else None
    with tempfile.TemporaryDirectory(prefix=_MAKING, dir=where) as folder:
        try:
            _write_database(root, manifest.shards, Path(folder))
        except sqlite3.Error as error:
            raise OneLLMError(
                f"{meta / 'index.sqlite'} cannot be made in {folder}: {error}.",
                "Megatron-Energon finds samples in it (training here does not use it).",
                "make room (about 400 bytes a sample) and run the same again, or do without (-o energon=false): what was built is kept.",
            ) from error
    splits: dict[str, list[str]] = {name: [] for name in _SPLITS}
    for shard in manifest.shards:
        splits.setdefault(shard.split, []).append(shard.path)
    info = {
        "energon_version": ENERGON_VERSION,
        "shard_counts": {s.path: s.samples for s in manifest.shards},
    }
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write(
        meta / "split.yaml",
        yaml.safe_dump({"split_parts": splits, "exclude": []}, sort_keys=False).encode(),
    )
    write(meta / "dataset.yaml", yaml.safe_dump(dataset, sort_keys=False).encode())
    write(
        meta / "index.uuid",
        str(uuid.UUID(bytes=hashlib.sha256(manifest.to_bytes()).digest()[:16], version=4)).encode(),
    )
    write(meta / ".info.json", json.dumps(info, indent=2).encode())


def _write_database(root: StoragePath, shards: Sequence[ShardInfo], scratch: Path) -> None:
    """index.sqlite, made locally (SQLite cannot write to stores), and each tar's `.idx` on the way."""
    local = scratch / f"{unique_name()}.sqlite"
    with closing(sqlite3.connect(local)) as database:
        # The file is thrown away after a crash, so nothing needs to be journalled.
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.executescript(_TABLES)
        for number, shard in enumerate(shards):
            tar = root / shard.path
            index = _index(tar, scratch)
            write(tar.with_name(f"{tar.name}.idx"), index.sample_starts().astype("<u8").tobytes())
            database.executemany(
                "INSERT INTO samples VALUES (?, ?, ?, ?, ?)", _samples(number, index)
            )
            database.executemany(
                "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", _parts(number, index)
            )
        database.commit()
        with _sorting_in(scratch, database):
            database.executescript(_INDEXES)
            database.commit()
    put(local, root / META / "index.sqlite")


@contextmanager
def _sorting_in(folder: Path, database: sqlite3.Connection) -> Iterator[None]:
    """SQLite sorts large indexes in files; they lie in $TMPDIR unless told otherwise (for the whole process, so it is taken back)."""
    text = str(folder).replace("'", "''")
    database.execute(f"PRAGMA temp_store_directory = '{text}'")
    try:
        yield
    finally:
        database.execute("PRAGMA temp_store_directory = ''")


def _index(tar: StoragePath, scratch: Path) -> ShardIndex:
    path = tar.with_name(f"{tar.name}.index")
    if isinstance(path, Path):
        return ShardIndex(path)
    copy = scratch / "remote.index"
    copy.write_bytes(path.read_bytes())
    return ShardIndex(copy)


def _samples(number: int, index: ShardIndex) -> Iterator[tuple[int, str, int, int, int]]:
    starts = index.sample_starts().astype(np.int64)
    for row, (key, start, size) in enumerate(
        zip(index.keys(), starts.tolist(), np.diff(starts).tolist(), strict=False)
    ):
        yield number, key, row, start, size


def _parts(number: int, index: ShardIndex) -> Iterator[tuple[int, int, str, int, int]]:
    for row in range(index.samples):
        for extension, place in index.parts(row).items():
            yield number, row, extension, place.offset, place.size


def energon_splits(root: Path) -> dict[str, str] | None:
    """Tar (path relative to `root`) -> split, of a set that `energon prepare` was run on; excluded tars are left out.

    `energon prepare` writes runs of names as `shards/{000000..000009}.tar`.

    Returns:
        None: there is no `.nv-meta/split.yaml` (or `.json`).

    Raises:
        UsageError: it cannot be read, or excludes single samples.
    """
    path = next(
        (p for p in (root / META / "split.yaml", root / META / "split.json") if p.is_file()), None
    )
    if path is None:
        return None
    try:
        content: Any = yaml.safe_load(path.read_bytes())
        excluded = {e for given in content.get("exclude") or [] for e in braceexpand(str(given))}
        splits = {
            t: str(s)
            for s, tars in content["split_parts"].items()
            for given in tars
            for t in braceexpand(str(given))
        }
    except (yaml.YAMLError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: {type(error).__name__}: {error}",
            "it says which tar belongs to which split.",
            "run `energon prepare` again.",
        ) from error
    if single := sorted(e for e in excluded if not e.endswith(".tar")):
        raise UsageError(
            f"{path} excludes {len(single)} single samples, {single[0]} the first.",
            "tars are indexed as they are, and these samples would be trained on.",
            "write the tars again without them, or exclude whole tars.",
        )
    return {tar: split for tar, split in splits.items() if tar not in excluded}
