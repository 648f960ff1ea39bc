"""Build one shard task: its raw samples become one output shard and a record.

(They become several shards if `max_bytes` cuts it.) The bytes depend on the plan, the task and the
input alone: not on who builds it, when, or beside whom.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import unique_name
from onellm_dist.common.reasons import find_shared_reason
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.shards.build.confine import confine, find_allowed_roots
from onellm_dist.shards.build.plan import BuildPlan, ShardTask, read_raw_samples
from onellm_dist.shards.build.prepare import PreparedSample
from onellm_dist.shards.build.registry import get_source
from onellm_dist.shards.format.dataset import ShardInfo
from onellm_dist.shards.format.index import get_index_path
from onellm_dist.shards.format.tar_writer import ShardWriter
from onellm_dist.shards.format.writer import get_shard_path
from onellm_dist.shards.sources.base import DamagedSample, QuarantinedSample, RawSample
from onellm_dist.shards.storage.paths import StoragePath, store_file, write_file

BUILT = "built"
"""Folder of the finished shards of an unfinished build."""
DONE = "done"
"""Folder of the task records of an unfinished build."""
ROW = np.dtype([("key", "<u8", 2), ("content", "<u8", 2), ("picture", "<u8")])
"""A written sample in `done/N.npy`: hashes of its key and of its media, dHash of its picture."""
LISTED = 100_000
"""Bad samples that a process keeps by name (about 40 MB); quarantine.jsonl has them all."""
DUPLICATE_KEY = "duplicate key: an earlier sample has it"


@dataclass(frozen=True)
class BuildJob:
    """What every process of a build needs to know."""

    plan: BuildPlan
    base: StoragePath
    """The folder of the unfinished build: plan, leases, task records, built shards."""
    scratch: Path
    """A local folder where shards are written; it lies below `base` if that is local."""
    inputs: StoragePath
    options: Mapping[str, Any]

    def read_raw_samples(self, task: ShardTask) -> Iterator[RawSample]:
        """Yield the raw samples of a task, in order; those outside of the input are bad."""
        source = get_source(self.plan.source)
        assert source.raw_samples is not None
        found = read_raw_samples(
            task, self.plan, self.base, self.inputs, self.options, source.raw_samples
        )
        return confine(found, self._allowed_roots)

    @cached_property
    def _allowed_roots(self) -> tuple[str, ...] | None:
        source, follow = get_source(self.plan.source), self.plan.settings.follow
        return find_allowed_roots(source, self.inputs, self.options, follow)


@dataclass
class BuildCounts:
    """Counts the samples of a build, and gives the build up when too many are bad."""

    total: int
    """Raw samples of the plan."""
    max_failures: float
    """The largest share of bad samples that is allowed."""
    seen: int = 0
    written: int = 0
    skipped: int = 0
    """Left out knowingly."""
    failures: int = 0
    """Bad samples."""
    bad: list[QuarantinedSample] = field(default_factory=list)
    """The first LISTED bad samples."""

    def add_record(self, record: TaskRecord) -> None:
        """Count a task that another process finished."""
        self.seen += record.raw_samples
        self.written += sum(s.samples for s in record.shards)
        self.skipped += sum(record.skipped.values())
        self.add_bad(record.quarantined)

    def add_bad(self, bad: Sequence[QuarantinedSample]) -> None:
        """Count some bad samples."""
        self.failures += len(bad)
        self.bad += bad[: max(0, LISTED - len(self.bad))]

    def check(self) -> None:
        """Check that no more samples are bad than may be bad of all.

        Raises:
            TooManyFailuresError: more are.
        """
        if self.failures > count_allowed_failures(self.max_failures, self.total):
            raise TooManyFailuresError(
                self.bad, self.seen, self.total, self.max_failures, self.failures
            )

    def check_end(self) -> None:
        """Check the same when all was seen. Samples that were left out knowingly do not count then.

        Raises:
            TooManyFailuresError: too many samples are bad, or all are.
            NoSamplesLeftError: the filters left nothing.
        """
        samples = self.seen - self.skipped
        allowed = count_allowed_failures(self.max_failures, samples)
        if self.failures > allowed or (self.failures and not self.written):
            raise TooManyFailuresError(
                self.bad, self.seen, samples, self.max_failures, self.failures
            )
        if not self.written:
            left_out = f"all {self.skipped} samples were"
            if self.skipped == 1:
                left_out = "the only sample was"
            raise NoSamplesLeftError(
                f"{left_out} left out by filters.",
                "an empty dataset cannot be read.",
                "check the filters' options.",
            )


@dataclass(frozen=True)
class TaskRecord:
    """`done/N.json`: what became of a task."""

    task: int
    """Number of the task."""
    plan: str
    """Digest of the plan."""
    raw_samples: int
    shards: tuple[ShardInfo, ...]
    """Paths as in the manifest; the files lie below `built/` until the build is finished."""
    text: tuple[str, ...]
    """Which of `.txt` and `.json` every sample has."""
    quarantined: tuple[QuarantinedSample, ...]
    skipped: Mapping[str, int]
    """Reason to the number of samples that were left out knowingly for it."""
    parts: Mapping[str, tuple[int, int]]
    """Extension to (parts, bytes)."""
    damaged: tuple[DamagedSample, ...] = ()

    def to_bytes(self) -> bytes:
        """Make the JSON of the record."""
        return json.dumps(asdict(self), sort_keys=True).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes) -> TaskRecord:
        """Parse the JSON of a record."""
        raw = json.loads(data)
        return cls(
            raw["task"],
            raw["plan"],
            raw["raw_samples"],
            tuple(ShardInfo(**s) for s in raw["shards"]),
            tuple(raw["text"]),
            tuple(QuarantinedSample(**q) for q in raw["quarantined"]),
            raw["skipped"],
            {e: (n, b) for e, (n, b) in raw["parts"].items()},
            tuple(DamagedSample(**d) for d in raw.get("damaged", ())),
        )


def hash_key(key: str) -> bytes:
    """Hash a key to 16 bytes."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


class _TaskShards:
    """The tars of a task; a new one begins before its content would exceed `max_bytes`."""

    def __init__(self, job: BuildJob, task: ShardTask) -> None:
        self.job = job
        self.task = task
        self.done: list[ShardInfo] = []
        self.current: ShardWriter | None = None

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append a sample."""
        size = sum(map(len, parts.values()))
        max_bytes = self.job.plan.settings.max_bytes
        if self.current is not None and self.current.content + size > max_bytes:
            self.close()
        if self.current is None:
            path = get_shard_path(self.task.split, self.task.shard, len(self.done))
            # A builder that seemed dead may still be writing this shard: it has another folder.
            own = self.job.scratch / unique_name()
            own.mkdir(parents=True, exist_ok=True)
            self.current = ShardWriter(
                own / Path(path).name,
                path=path,
                split=self.task.split,
                media_of=self.job.plan.media_of,
            )
        self.current.add(key, parts)

    def close(self) -> None:
        """End the open tar, and move it and its index to `built/`."""
        if self.current is not None:
            info = self.current.close()
            local = self.current.target
            built = self.job.base / BUILT
            store_file(get_index_path(local), built / get_index_path(local).name)
            store_file(local, built / local.name)
            self.done.append(info)
            self.current = None

    def abandon(self) -> None:
        """Remove the open tar."""
        if self.current is not None:
            self.current.abandon()
            self.current = None


class _TaskWriter:
    """Writes the samples of a task, and gathers its record."""

    def __init__(self, job: BuildJob, task: ShardTask, counts: BuildCounts) -> None:
        self.job = job
        self.task = task
        self.counts = counts
        self.shards = _TaskShards(job, task)
        self.keys: set[str] = set()
        self.rows: list[bytes] = []
        self.bad: list[QuarantinedSample] = []
        self.damaged: list[DamagedSample] = []
        self.skipped: Counter[str] = Counter()
        self.parts: dict[str, tuple[int, int]] = {}
        self.text = set(TEXT_EXTENSIONS)

    def add(self, sample: PreparedSample) -> None:
        """Write a sample, or note why it is left out."""
        self.counts.seen += 1
        if sample.parts is not None and sample.key not in self.keys:
            self._write(sample, sample.parts)
            self.counts.written += 1
        elif sample.skipped:
            self.skipped[sample.reason] += 1
            self.counts.skipped += 1
        else:
            reason = sample.reason or DUPLICATE_KEY
            self.bad.append(QuarantinedSample(sample.key, sample.where, reason))
            self.counts.add_bad(self.bad[-1:])
            self.counts.check()

    def _write(self, sample: PreparedSample, parts: Mapping[str, bytes]) -> None:
        self.shards.add(sample.key, parts)
        self.keys.add(sample.key)
        if sample.damage:
            damage = "; ".join(sample.damage)
            self.damaged.append(DamagedSample(sample.key, sample.where, damage))
        picture = sample.picture_hash.to_bytes(8, "little")
        self.rows.append(hash_key(sample.key) + sample.content_hash + picture)
        self.text &= parts.keys()
        for extension, data in parts.items():
            count, size = self.parts.get(extension, (0, 0))
            self.parts[extension] = (count + 1, size + len(data))

    def save(self) -> TaskRecord:
        """Write the record and the rows of hashes of a task whose shards are closed."""
        record = TaskRecord(
            self.task.number,
            self.job.plan.digest,
            self.task.raw_samples,
            tuple(self.shards.done),
            tuple(e for e in TEXT_EXTENSIONS if e in self.text),
            tuple(self.bad),
            dict(sorted(self.skipped.items())),
            dict(sorted(self.parts.items())),
            tuple(self.damaged),
        )
        buffer = io.BytesIO()
        np.save(buffer, np.frombuffer(b"".join(self.rows), ROW))
        folder = self.job.base / DONE
        write_file(folder / f"{self.task.number:06d}.npy", buffer.getvalue())
        write_file(folder / f"{self.task.number:06d}.json", record.to_bytes())
        return record


def build_shard_task(
    task: ShardTask, job: BuildJob, samples: Iterable[PreparedSample], counts: BuildCounts
) -> TaskRecord:
    """Write the shards of a task and its record.

    Args:
        task: one of the plan's.
        job: the build.
        samples: the task's samples, prepared.
        counts: they are counted here.

    Raises:
        TooManyFailuresError: too many samples are bad; nothing of the task is kept.
    """
    writer = _TaskWriter(job, task, counts)
    try:
        for sample in samples:
            writer.add(sample)
        writer.shards.close()
    except BaseException:
        writer.shards.abandon()
        raise
    return writer.save()


def read_record(base: StoragePath, task: ShardTask, plan: BuildPlan) -> TaskRecord | None:
    """Read the record of a task; None: it is not built, or the record is incomplete."""
    try:
        record = TaskRecord.from_bytes((base / DONE / f"{task.number:06d}.json").read_bytes())
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return record if record.plan == plan.digest else None


def read_rows(base: StoragePath, task: int) -> NDArray[np.void]:
    """Read the hashes of a task's samples, [samples] of dtype ROW, in the order of its shards."""
    rows: NDArray[np.void] = np.load(io.BytesIO((base / DONE / f"{task:06d}.npy").read_bytes()))
    return rows


def count_allowed_failures(max_failures: float, total: int) -> int:
    """Return how many of `total` samples may be bad."""
    return int(max_failures * total + 1e-9)  # 0.29 * 100 is 28.999...


class NoSamplesLeftError(OneLLMError):
    """Filters left no sample."""


class TooManyFailuresError(OneLLMError):
    """The build was given up.

    Args:
        bad: the first LISTED bad samples that were found until then.
        seen: raw samples that were read.
        total: raw samples of the plan.
        max_failures: the share of bad samples that is allowed.
        failures: bad samples.
    """

    def __init__(
        self,
        bad: list[QuarantinedSample],
        seen: int,
        total: int,
        max_failures: float,
        failures: int,
    ) -> None:
        self.bad = list(bad)
        self.seen = seen
        self.total = total
        self.max_failures = max_failures
        self.failures = failures
        allowed = count_allowed_failures(max_failures, total)
        shown = "\n".join(f"  {q.file}: {q.reason}" for q in bad[:5])
        more = f"\n  and {failures - 5} more" if failures > 5 else ""
        reason = find_shared_reason(q.reason for q in bad) if failures >= seen else None
        alike = f", and all fail alike ({reason})" if reason else ""
        super().__init__(
            f"bad samples: {failures} of the first {seen}{alike}; max_failures={max_failures:g} "
            f"allows {allowed} of all {total}:\n{shown}{more}",
            "broken files do not fail like this: a library, the environment or the recipe is the "
            "cause, not the data; nothing is built."
            if reason
            else "so many failures mean a wrong input rather than a few broken files; nothing is "
            "built.",
            "check the source, the modality and the options against what IN holds, and run `onellm "
            "doctor`."
            if reason
            else "repair the samples (listed in OUT.quarantine.jsonl), or allow more: "
            "-o max_failures=0.2",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the arguments, so that worker processes can raise it."""
        return type(self), (self.bad, self.seen, self.total, self.max_failures, self.failures)
