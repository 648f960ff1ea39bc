"""The end of a build: duplicates go, shards take their places, and the files of the whole dataset are written.

Every step may be repeated after a kill: a shard that stands in its place is left there, and files are written whole.
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

from onellm_dist.common.files import sync, unique_name
from onellm_dist.common.progress import progress
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.shards.build.duplicates import find_duplicates
from onellm_dist.shards.build.staging import QUARANTINE
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
from onellm_dist.shards.sources.base import QuarantinedSample
from onellm_dist.shards.storage.paths import StoragePath, move, put, write

STATISTICS = "statistics.json"


class _Move(NamedTuple):
    """One built shard on its way to its place."""

    info: ShardInfo
    drop: tuple[int, ...]
    """Rows that repeat earlier samples."""


class BuiltTasks(NamedTuple):
    """What all units together made, before duplicate keys are known."""

    records: list[TaskRecord]
    """Without their bad samples."""
    account: BuildCounts
    kinds: Counter[str]
    """Bad samples by the reason's first words."""
    quarantine: Path
    """A local file of all bad samples, in plan order."""


class FinishedDataset(NamedTuple):
    """What the dataset became."""

    samples: int
    quarantined: tuple[QuarantinedSample, ...]
    """The first LISTED."""
    failures: int
    notes: tuple[str, ...]
    manifest: Manifest
    """Not written yet: it says that the dataset is whole."""


def finish(job: BuildJob, built: BuiltTasks, final: StoragePath, *, workers: int) -> FinishedDataset:
    """Puts the dataset together in `final`, all but its manifest.

    Raises:
        TooManyFailures: too many samples are bad.
        OneLLMError: there is no sample.
    """
    plan, settings = job.plan, job.plan.settings
    records, account = built.records, built.account
    repeated = _repeated(job)
    bad_keys = [
        _named(job, records[u], row)
        for u, rows in sorted(repeated.items())
        for row, why in sorted(rows.items())
        if why == "key"
    ]
    account.note(bad_keys)
    account.check_end()
    moves = [m for r in records for m in _moves(r, repeated.get(r.unit, {}))]
    shards = [s for s in _settled(job, moves, final, workers) if s is not None]
    text = tuple(e for e in TEXT_EXTENSIONS if all(e in r.text for r in records if r.shards))
    manifest = Manifest(
        settings.name,
        plan.modalities,
        text,
        settings.licence,
        plan.source,
        tuple(sorted(shards, key=lambda s: s.path)),
        plan.attributes,
    )
    kinds = built.kinds + Counter(_kind(q) for q in bad_keys)
    if account.failures:
        with built.quarantine.open("ab") as file:
            file.write(format_quarantine(bad_keys))
            file.flush()
            os.fsync(file.fileno())
        put(built.quarantine, final / QUARANTINE)
    if isinstance(final, Path):
        sync(final / SHARD_FOLDER)
    write(
        final / STATISTICS,
        json.dumps(
            _statistics(records, manifest, kinds, repeated), indent=1, sort_keys=True
        ).encode(),
    )
    skipped = _skipped(records, repeated)
    notes = (*plan.notes, *(f"left out knowingly: {n} x {reason}" for reason, n in skipped.items()))
    return FinishedDataset(
        sum(s.samples for s in shards), tuple(account.bad), account.failures, notes, manifest
    )


def read_all_records(job: BuildJob) -> BuiltTasks | None:
    """The done records of all units, in plan order; None: some are missing."""
    records, account, kinds = (
        list[TaskRecord](),
        BuildCounts(job.plan.total, job.plan.settings.max_failures),
        Counter[str](),
    )
    own = job.scratch / unique_name()
    own.mkdir(parents=True, exist_ok=True)
    with (own / QUARANTINE).open("wb") as file:
        for unit in job.plan.units:
            record = read_record(job.base, unit, job.plan)
            if record is None:
                return None
            account.take(record)
            kinds.update(_kind(q) for q in record.quarantined)
            file.write(format_quarantine(record.quarantined))
            records.append(replace(record, quarantined=()))
    return BuiltTasks(records, account, kinds, own / QUARANTINE)


def _kind(bad: QuarantinedSample) -> str:
    return bad.reason.split(":")[0]


def format_quarantine(bad: Sequence[QuarantinedSample]) -> bytes:
    """One JSON object a line: key, file, reason."""
    return "".join(
        json.dumps({"key": q.key, "file": q.file, "reason": q.reason}) + "\n" for q in bad
    ).encode("ascii")


def _repeated(job: BuildJob) -> dict[int, dict[int, str]]:
    settings = job.plan.settings

    def rows() -> Iterator[tuple[int, NDArray[np.void]]]:
        for unit in job.plan.units:
            yield unit.number, read_rows(job.base, unit.number)

    return find_duplicates(
        rows, keys=True, dedup=settings.dedup, distance=settings.dedup_distance, scratch=job.scratch
    )


def _named(job: BuildJob, record: TaskRecord, row: int) -> QuarantinedSample:
    """The quarantine's line for a sample of a built shard (one with rows to drop stays where it was built)."""
    for info in record.shards:
        if row < info.samples:
            built = job.base / BUILT / Path(info.path).name
            with _local(job, get_index_path(built)) as index:
                return QuarantinedSample(
                    ShardIndex(index).key(row), f"{info.path}, row {row}", DUPLICATE_KEY
                )
        row -= info.samples
    raise AssertionError("a row beyond the unit's shards")


def get_index_path(tar: StoragePath) -> StoragePath:
    """`x.tar` -> `x.tar.index`, local or remote."""
    return tar.with_name(f"{tar.name}.index")


@contextmanager
def _local(job: BuildJob, place: StoragePath) -> Iterator[Path]:
    """A file as a local one: itself, or a copy for the time being."""
    if isinstance(place, Path):
        yield place
        return
    own = job.scratch / unique_name()
    own.mkdir(parents=True, exist_ok=True)
    copy = own / place.name
    copy.write_bytes(place.read_bytes())
    try:
        yield copy
    finally:
        copy.unlink()


def _moves(record: TaskRecord, repeated: Mapping[int, str]) -> Iterator[_Move]:
    first = 0
    for info in record.shards:
        yield _Move(
            info,
            tuple(row - first for row in sorted(repeated) if first <= row < first + info.samples),
        )
        first += info.samples


def _settled(
    job: BuildJob, moves: list[_Move], final: StoragePath, workers: int
) -> Iterator[ShardInfo | None]:
    """Each shard as it stands in `final`; None: nothing of it is left."""
    with progress(
        len(moves), f"Finishing {job.plan.settings.name}", unit="shards", enabled=len(moves) > 1000
    ) as bar:
        rewritten = [m for m in moves if m.drop]
        if workers > 1 and len(rewritten) > 2 * workers:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for _ in pool.map(
                    _settle, [job] * len(rewritten), rewritten, [final] * len(rewritten)
                ):
                    bar.advance()
        for move_ in moves:
            yield _settle(job, move_, final)
            bar.advance()


def _settle(job: BuildJob, shard: _Move, final: StoragePath) -> ShardInfo | None:
    info, name = shard.info, Path(shard.info.path).name
    built, target = job.base / BUILT / name, final / info.path
    note = job.base / BUILT / f"{name}.settled"
    if not shard.drop:
        move(get_index_path(built), get_index_path(target))
        move(built, target)
        return info
    if note.exists():
        return _noted(note.read_bytes())
    with _local(job, get_index_path(built)) as index_file, _local(job, built) as tar:
        kept = _without(job, tar, ShardIndex(index_file), shard, target)
    write(note, json.dumps(None if kept is None else vars(kept)).encode())
    return kept


def _noted(data: bytes) -> ShardInfo | None:
    raw: dict[str, Any] | None = json.loads(data)
    return None if raw is None else ShardInfo(**raw)


def _without(
    job: BuildJob, tar: Path, index: ShardIndex, shard: _Move, target: StoragePath
) -> ShardInfo | None:
    """Writes the shard without the rows that go; the built one stays until the build's folder is removed."""
    drop = set(shard.drop)
    if len(drop) == index.samples:
        return None
    own = job.scratch / unique_name() / "kept"
    own.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(own / tar.name, path=shard.info.path, split=shard.info.split)
    with tar.open("rb") as file:
        for row in range(index.samples):
            if row in drop:
                continue
            parts = {}
            for extension, place in index.parts(row).items():
                file.seek(place.offset)
                parts[extension] = file.read(place.size)
            writer.add(index.key(row), parts)
    info = writer.close()
    put(get_index_path(own / tar.name), get_index_path(target))
    put(own / tar.name, target)
    return info


def _skipped(records: list[TaskRecord], repeated: Mapping[int, Mapping[int, str]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.skipped)
    counts.update(
        f"duplicate: {why}" for rows in repeated.values() for why in rows.values() if why != "key"
    )
    return dict(sorted(counts.items()))


def _statistics(
    records: list[TaskRecord],
    manifest: Manifest,
    kinds: Counter[str],
    repeated: Mapping[int, Mapping[int, str]],
) -> dict[str, Any]:
    """statistics.json: what the build saw."""
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
        "parts_before_duplicates_went": {
            e: {"count": c, "bytes": b} for e, (c, b) in parts.items()
        },
        "quarantined": dict(kinds),
        "left_out": _skipped(records, repeated),
    }
