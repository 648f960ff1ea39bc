"""The end of a build: drop duplicates, move shards to their places, write the files of the dataset.

Every step may be repeated after a kill: a shard that is in its place stays there, and files appear
complete.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.counts import format_count
from onellm_dist.common.files import sync, unique_name
from onellm_dist.common.progress import progress
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.shards.build.duplicates import find_duplicates
from onellm_dist.shards.build.staging import DAMAGED, QUARANTINE
from onellm_dist.shards.build.task import (
    BUILT,
    DUPLICATE_KEY,
    BuildCounts,
    BuildJob,
    TaskRecord,
    read_record,
    read_rows,
)
from onellm_dist.shards.format.dataset import SHARD_FOLDER, Manifest, ShardInfo
from onellm_dist.shards.format.index import ShardIndex, get_index_path
from onellm_dist.shards.format.tar_writer import ShardWriter
from onellm_dist.shards.sources.base import DamagedSample, QuarantinedSample
from onellm_dist.shards.storage.paths import StoragePath, move_file, store_file, write_file

STATISTICS = "statistics.json"
_SHOWN_BAR = 1000
"""Shards from which on finishing shows a progress bar."""


class BuiltTasks(NamedTuple):
    """What all tasks together produced, before duplicate keys are known."""

    records: list[TaskRecord]
    """One shard a task, in plan order, without the bad samples."""
    counts: BuildCounts
    reasons: Counter[str]
    """First words of a reason to the number of bad samples."""
    quarantine: Path
    """A local file of all bad samples, in plan order."""
    damaged: Path
    """A local file of all samples that are used although they are damaged, in plan order."""
    damaged_count: int


class FinishedDataset(NamedTuple):
    """The dataset that a build produced, but for its manifest."""

    samples: int
    quarantined: tuple[QuarantinedSample, ...]
    """The first LISTED bad samples."""
    failures: int
    """All bad samples."""
    notes: tuple[str, ...]
    manifest: Manifest
    """Manifest of the dataset, not written yet because it marks the dataset as complete."""


class _BuiltShard(NamedTuple):
    """A built shard that is about to be moved to its place."""

    info: ShardInfo
    dropped: tuple[int, ...]
    """Rows that repeat earlier samples."""


def finish_dataset(
    job: BuildJob, built: BuiltTasks, final: StoragePath, *, workers: int
) -> FinishedDataset:
    """Put the dataset together in `final`, except for its manifest.

    Args:
        job: the build.
        built: what its tasks produced.
        final: the dataset's folder.
        workers: processes that rewrite shards with duplicates.

    Raises:
        TooManyFailuresError: too many samples are bad.
        OneLLMError: no sample is left.
    """
    records, counts = built.records, built.counts
    repeated = _find_repeated(job)
    bad_keys = [
        _name_bad_key(job, records[task], row)
        for task, rows in sorted(repeated.items())
        for row, why in sorted(rows.items())
        if why == "key"
    ]
    counts.add_bad(bad_keys)
    counts.check_end()
    moves = [s for record in records for s in _list_shards(record, repeated.get(record.task, {}))]
    shards = [s for s in _place_shards(job, moves, final, workers) if s is not None]
    manifest = _make_manifest(job, records, shards)
    if counts.failures:
        _store_quarantine(built.quarantine, bad_keys, final)
    if built.damaged_count:
        store_file(built.damaged, final / DAMAGED)
    if isinstance(final, Path):
        sync(final / SHARD_FOLDER)
    reasons = built.reasons + Counter(_get_first_words(q) for q in bad_keys)
    statistics = _make_statistics(records, manifest, reasons, repeated)
    statistics["damaged"] = built.damaged_count
    write_file(final / STATISTICS, json.dumps(statistics, indent=1, sort_keys=True).encode())
    skipped = _count_skipped(records, repeated)
    notes = [f"left out knowingly: {n} x {reason}" for reason, n in skipped.items()]
    if built.damaged_count:
        notes.append(
            f"damaged, but used: {format_count(built.damaged_count, 'sample')} ({DAMAGED} says "
            "what)"
        )
    return FinishedDataset(
        sum(s.samples for s in shards),
        tuple(counts.bad),
        counts.failures,
        (*job.plan.notes, *notes),
        manifest,
    )


def _make_manifest(
    job: BuildJob, records: list[TaskRecord], shards: Sequence[ShardInfo]
) -> Manifest:
    plan = job.plan
    text = tuple(e for e in TEXT_EXTENSIONS if all(e in r.text for r in records if r.shards))
    return Manifest(
        plan.settings.name,
        plan.modalities,
        text,
        plan.settings.licence,
        plan.source,
        tuple(sorted(shards, key=lambda s: s.path)),
        plan.attributes,
    )


def _store_quarantine(
    local: Path, bad_keys: Sequence[QuarantinedSample], final: StoragePath
) -> None:
    """Append the duplicate keys to the list of bad samples, and store it in the dataset."""
    with local.open("ab") as file:
        file.write(format_quarantine(bad_keys))
        file.flush()
        os.fsync(file.fileno())
    store_file(local, final / QUARANTINE)


def read_all_records(job: BuildJob) -> BuiltTasks | None:
    """Read the records of all tasks, in plan order; None: some are missing."""
    records = list[TaskRecord]()
    counts = BuildCounts(job.plan.total, job.plan.settings.max_failures)
    reasons = Counter[str]()
    own = job.scratch / unique_name()
    own.mkdir(parents=True, exist_ok=True)
    damaged_count = 0
    with (own / QUARANTINE).open("wb") as file, (own / DAMAGED).open("wb") as damaged:
        for task in job.plan.tasks:
            record = read_record(job.base, task, job.plan)
            if record is None:
                return None
            counts.add_record(record)
            reasons.update(_get_first_words(q) for q in record.quarantined)
            file.write(format_quarantine(record.quarantined))
            damaged.write(_format_damaged(record.damaged))
            damaged_count += len(record.damaged)
            records.append(replace(record, quarantined=(), damaged=()))
    return BuiltTasks(records, counts, reasons, own / QUARANTINE, own / DAMAGED, damaged_count)


def _get_first_words(bad: QuarantinedSample) -> str:
    return bad.reason.split(":")[0]


def format_quarantine(bad: Sequence[QuarantinedSample]) -> bytes:
    """Format bad samples as one JSON object a line: key, file, reason."""
    lines = (json.dumps({"key": q.key, "file": q.file, "reason": q.reason}) + "\n" for q in bad)
    return "".join(lines).encode("ascii")


def _format_damaged(damaged: Sequence[DamagedSample]) -> bytes:
    """Format damaged samples as one JSON object a line: key, file, damage."""
    return "".join(json.dumps(vars(d)) + "\n" for d in damaged).encode("ascii")


def _find_repeated(job: BuildJob) -> dict[int, dict[int, str]]:
    """Return task to row to what the row repeats."""
    settings = job.plan.settings

    def rows() -> Iterator[tuple[int, NDArray[np.void]]]:
        for task in job.plan.tasks:
            yield task.number, read_rows(job.base, task.number)

    return find_duplicates(
        rows, keys=True, dedup=settings.dedup, distance=settings.dedup_distance, scratch=job.scratch
    )


def _name_bad_key(job: BuildJob, record: TaskRecord, row: int) -> QuarantinedSample:
    """Name a sample of a built shard whose key is repeated (its shard stays where it was built)."""
    for info in record.shards:
        if row < info.samples:
            built = job.base / BUILT / Path(info.path).name
            with _copy_locally(job, get_index_path(built)) as index:
                key = ShardIndex(index).key(row)
            return QuarantinedSample(key, f"{info.path}, row {row}", DUPLICATE_KEY)
        row -= info.samples
    raise AssertionError("a row beyond the shards of its task")


@contextmanager
def _copy_locally(job: BuildJob, path: StoragePath) -> Iterator[Path]:
    """Yield a local file, or a temporary local copy of a remote one."""
    if isinstance(path, Path):
        yield path
        return
    own = job.scratch / unique_name()
    own.mkdir(parents=True, exist_ok=True)
    copy = own / path.name
    copy.write_bytes(path.read_bytes())
    try:
        yield copy
    finally:
        copy.unlink()


def _list_shards(record: TaskRecord, repeated: Mapping[int, str]) -> Iterator[_BuiltShard]:
    first = 0
    for info in record.shards:
        rows = sorted(row - first for row in repeated if first <= row < first + info.samples)
        yield _BuiltShard(info, tuple(rows))
        first += info.samples


def _place_shards(
    job: BuildJob, shards: list[_BuiltShard], final: StoragePath, workers: int
) -> Iterator[ShardInfo | None]:
    """Move each shard to its place in `final`, and yield what it is then; None: nothing is left."""
    name = job.plan.settings.name
    shown = len(shards) > _SHOWN_BAR
    with progress(len(shards), f"Finishing {name}", unit="shards", enabled=shown) as bar:
        rewritten = [s for s in shards if s.dropped]
        if workers > 1 and len(rewritten) > 2 * workers:
            count = len(rewritten)
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for _ in pool.map(_place_shard, [job] * count, rewritten, [final] * count):
                    bar.advance()
        for shard in shards:
            yield _place_shard(job, shard, final)
            bar.advance()


def _place_shard(job: BuildJob, shard: _BuiltShard, final: StoragePath) -> ShardInfo | None:
    info, name = shard.info, Path(shard.info.path).name
    built, target = job.base / BUILT / name, final / info.path
    note = job.base / BUILT / f"{name}.placed"
    if not shard.dropped:
        move_file(get_index_path(built), get_index_path(target))
        move_file(built, target)
        return info
    if note.exists():
        return _parse_note(note.read_bytes())
    with (
        _copy_locally(job, get_index_path(built)) as index_file,
        _copy_locally(job, built) as tar,
    ):
        kept = _rewrite_shard(job, tar, ShardIndex(index_file), shard, target)
    write_file(note, json.dumps(None if kept is None else vars(kept)).encode())
    return kept


def _parse_note(data: bytes) -> ShardInfo | None:
    raw: dict[str, Any] | None = json.loads(data)
    return None if raw is None else ShardInfo(**raw)


def _rewrite_shard(
    job: BuildJob, tar: Path, index: ShardIndex, shard: _BuiltShard, target: StoragePath
) -> ShardInfo | None:
    """Write the shard without the rows that are dropped.

    The built shard stays until the build's folder is removed.
    """
    dropped = set(shard.dropped)
    if len(dropped) == index.samples:
        return None
    own = job.scratch / unique_name() / "kept"
    own.mkdir(parents=True, exist_ok=True)
    info, media_of = shard.info, job.plan.media_of
    writer = ShardWriter(own / tar.name, path=info.path, split=info.split, media_of=media_of)
    with tar.open("rb") as file:
        for row in range(index.samples):
            if row in dropped:
                continue
            parts = {}
            for extension, location in index.parts(row).items():
                file.seek(location.offset)
                parts[extension] = file.read(location.size)
            writer.add(index.key(row), parts)
    info = writer.close()
    store_file(get_index_path(own / tar.name), get_index_path(target))
    store_file(own / tar.name, target)
    return info


def _count_skipped(
    records: list[TaskRecord], repeated: Mapping[int, Mapping[int, str]]
) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.skipped)
    counts.update(
        f"duplicate: {why}" for rows in repeated.values() for why in rows.values() if why != "key"
    )
    return dict(sorted(counts.items()))


def _make_statistics(
    records: list[TaskRecord],
    manifest: Manifest,
    reasons: Counter[str],
    repeated: Mapping[int, Mapping[int, str]],
) -> dict[str, Any]:
    """Make the content of statistics.json: what the build read and what it stored."""
    parts: dict[str, list[int]] = {}
    for record in records:
        for extension, (count, size) in record.parts.items():
            entry = parts.setdefault(extension, [0, 0])
            entry[0] += count
            entry[1] += size
    splits: Counter[str] = Counter()
    for shard in manifest.shards:
        splits[shard.split] += shard.samples
    return {
        "raw_samples": sum(r.raw_samples for r in records),
        "samples": sum(splits.values()),
        "splits": dict(splits),
        "shards": len(manifest.shards),
        "bytes": sum(s.bytes for s in manifest.shards),
        "parts_before_deduplication": {e: {"count": c, "bytes": b} for e, (c, b) in parts.items()},
        "quarantined": dict(reasons),
        "left_out": _count_skipped(records, repeated),
    }
