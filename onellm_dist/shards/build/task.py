"""Builds one unit of the plan: its raw_samples become one output shard (more where `max_bytes` cuts it) and a done record.

The bytes depend on the plan, the unit and the input alone: not on who builds it, when, or beside whom.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import unique_name
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.shards.build.plan import Plan, ShardTask, unit_raw_samples
from onellm_dist.shards.build.prepare import Outcome, prepare
from onellm_dist.shards.build.registry import get_source
from onellm_dist.shards.format.dataset import ShardInfo
from onellm_dist.shards.format.index import get_index_path
from onellm_dist.shards.format.tar_writer import ShardWriter
from onellm_dist.shards.format.writer import shard_path
from onellm_dist.shards.sources.base import QuarantinedSample, RawSample
from onellm_dist.shards.storage.paths import StoragePath, put, write

BUILT, DONE = "built", "done"
ROW = np.dtype([("key", "<u8", 2), ("content", "<u8", 2), ("look", "<u8")])
"""A written sample in `done/N.npy`: hashes of its key and of its media, dHash of its picture."""
LISTED = 100_000
"""Bad samples that a process holds by name (about 40 MB); quarantine.jsonl has them all."""
DUPLICATE_KEY = "duplicate key: an earlier sample has it"


@dataclass(frozen=True)
class Job:
    """What every process of a build needs to know."""

    plan: Plan
    base: StoragePath
    """The unfinished build: plan, claims, done records, built shards."""
    scratch: Path
    """A local folder where shards are written; below `base` where that is local."""
    inputs: StoragePath
    options: Mapping[str, Any]

    def raw_samples(self, unit: ShardTask) -> Iterator[RawSample]:
        """The unit's raw_samples, in order."""
        list_group = get_source(self.plan.source).raw_samples
        assert list_group is not None
        return unit_raw_samples(unit, self.plan, self.base, self.inputs, self.options, list_group)

    def prepared(self, unit: ShardTask) -> Iterator[Outcome]:
        """The unit's raw_samples prepared in this process."""
        return (
            prepare(c, self.plan.modalities, self.plan.settings) for c in self.raw_samples(unit)
        )


@dataclass
class Account:
    """Counts bad samples, and gives the build up when there are too many."""

    total: int
    max_failures: float
    seen: int = 0
    written: int = 0
    skipped: int = 0
    failures: int = 0
    """Bad samples."""
    bad: list[QuarantinedSample] = field(default_factory=list)
    """The first LISTED of them."""

    def take(self, record: Record) -> None:
        """A finished unit of somebody else's."""
        self.seen += record.raw_samples
        self.written += sum(s.samples for s in record.shards)
        self.skipped += sum(record.skipped.values())
        self.note(record.quarantined)

    def note(self, bad: Sequence[QuarantinedSample]) -> None:
        """Some bad samples."""
        self.failures += len(bad)
        self.bad += bad[: max(0, LISTED - len(self.bad))]

    def check(self) -> None:
        """Raises TooManyFailures where more are bad than may be of all that will be seen."""
        if self.failures > allowed(self.max_failures, self.total):
            raise TooManyFailures(self.bad, self.seen, self.total, self.max_failures, self.failures)

    def check_end(self) -> None:
        """The same when all was seen; those that were left out knowingly do not count as samples then.

        Raises:
            TooManyFailures: too many are bad, or all.
            NothingLeft: the filters left nothing.
        """
        samples = self.seen - self.skipped
        if self.failures > allowed(self.max_failures, samples) or (
            self.failures and not self.written
        ):
            raise TooManyFailures(self.bad, self.seen, samples, self.max_failures, self.failures)
        if not self.written:
            raise NothingLeft(
                f"all {self.skipped} samples were left out by filters.",
                "an empty dataset cannot be read.",
                "check the filters' options.",
            )


@dataclass(frozen=True)
class Record:
    """What stands in `done/N.json`."""

    unit: int
    plan: str
    raw_samples: int
    shards: tuple[ShardInfo, ...]
    """Paths as in the manifest; the files lie below `built/` until the build is finished."""
    text: tuple[str, ...]
    quarantined: tuple[QuarantinedSample, ...]
    skipped: Mapping[str, int]
    parts: Mapping[str, tuple[int, int]]
    """Extension to (parts, bytes)."""

    def to_bytes(self) -> bytes:
        """The done record."""
        return json.dumps(asdict(self), sort_keys=True).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Parses a done record."""
        raw = json.loads(data)
        return cls(
            raw["unit"],
            raw["plan"],
            raw["raw_samples"],
            tuple(ShardInfo(**s) for s in raw["shards"]),
            tuple(raw["text"]),
            tuple(QuarantinedSample(**q) for q in raw["quarantined"]),
            raw["skipped"],
            {e: (n, b) for e, (n, b) in raw["parts"].items()},
        )


def key_hash(key: str) -> bytes:
    """16 bytes of a key."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


class _Shards:
    """The unit's tars; a new one begins where the next sample would take the content beyond `max_bytes`."""

    def __init__(self, job: Job, unit: ShardTask) -> None:
        self.job, self.unit = job, unit
        self.done: list[ShardInfo] = []
        self.current: ShardWriter | None = None

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        size = sum(map(len, parts.values()))
        if (
            self.current is not None
            and self.current.content + size > self.job.plan.settings.max_bytes
        ):
            self.close()
        if self.current is None:
            path = shard_path(self.unit.split, self.unit.shard, len(self.done))
            own = (
                self.job.scratch / unique_name()
            )  # a builder that was thought dead may still be writing this shard
            own.mkdir(parents=True, exist_ok=True)
            self.current = ShardWriter(own / Path(path).name, path=path, split=self.unit.split)
        self.current.add(key, parts)

    def close(self) -> None:
        if self.current is not None:
            info = self.current.close()
            local = self.current.target
            built = self.job.base / BUILT
            put(get_index_path(local), built / get_index_path(local).name)
            put(local, built / local.name)
            self.done.append(info)
            self.current = None

    def abandon(self) -> None:
        if self.current is not None:
            self.current.abandon()
            self.current = None


def build_unit(unit: ShardTask, job: Job, outcomes: Iterator[Outcome], account: Account) -> Record:
    """Writes the unit's shards and its done record.

    Raises:
        TooManyFailures: `account` says so; nothing of the unit stays.
    """
    shards, keys, rows = _Shards(job, unit), set[str](), list[bytes]()
    bad, skipped, parts, text = (
        list[QuarantinedSample](),
        Counter[str](),
        dict[str, tuple[int, int]](),
        set(TEXT_EXTENSIONS),
    )
    try:
        for outcome in outcomes:
            account.seen += 1
            if outcome.parts is not None and outcome.key not in keys:
                shards.add(outcome.key, outcome.parts)
                keys.add(outcome.key)
                rows.append(
                    key_hash(outcome.key) + outcome.content + outcome.look.to_bytes(8, "little")
                )
                text &= outcome.parts.keys()
                for extension, data in outcome.parts.items():
                    count, size = parts.get(extension, (0, 0))
                    parts[extension] = (count + 1, size + len(data))
                account.written += 1
            elif outcome.skipped:
                skipped[outcome.reason] += 1
                account.skipped += 1
            else:
                bad.append(
                    QuarantinedSample(outcome.key, outcome.where, outcome.reason or DUPLICATE_KEY)
                )
                account.note(bad[-1:])
                account.check()
        shards.close()
    except BaseException:
        shards.abandon()
        raise
    record = Record(
        unit.number,
        job.plan.digest,
        unit.raw_samples,
        tuple(shards.done),
        tuple(e for e in TEXT_EXTENSIONS if e in text),
        tuple(bad),
        dict(sorted(skipped.items())),
        dict(sorted(parts.items())),
    )
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(b"".join(rows), ROW))
    write(job.base / DONE / f"{unit.number:06d}.npy", buffer.getvalue())
    write(job.base / DONE / f"{unit.number:06d}.json", record.to_bytes())
    return record


def read_record(base: StoragePath, unit: ShardTask, plan: Plan) -> Record | None:
    """A unit's done record; None: it is not built, or its files are not there in full."""
    try:
        record = Record.from_bytes((base / DONE / f"{unit.number:06d}.json").read_bytes())
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return record if record.plan == plan.digest else None


def read_rows(base: StoragePath, unit: int) -> NDArray[np.void]:
    """[samples] of dtype ROW: the unit's samples in the order of its shards."""
    return np.load(io.BytesIO((base / DONE / f"{unit:06d}.npy").read_bytes()))  # type: ignore[no-any-return]


def allowed(max_failures: float, total: int) -> int:
    """How many of `total` may be bad."""
    return int(max_failures * total + 1e-9)  # 0.29 * 100 is 28.999...


class NothingLeft(OneLLMError):
    """Filters left no sample."""


class TooManyFailures(OneLLMError):
    """The build was given up; `bad` has what was found until then (the first LISTED of `failures`)."""

    def __init__(
        self,
        bad: list[QuarantinedSample],
        seen: int,
        total: int,
        max_failures: float,
        failures: int,
    ) -> None:
        self.bad, self.seen, self.total, self.max_failures, self.failures = (
            list(bad),
            seen,
            total,
            max_failures,
            failures,
        )
        shown = "\n".join(f"  {q.file}: {q.reason}" for q in bad[:5])
        super().__init__(
            f"{failures} of the first {seen} samples are bad; max_failures={max_failures:g} allows "
            f"{allowed(max_failures, total)} of all {total}:\n{shown}"
            + (f"\n  and {failures - 5} more" if failures > 5 else ""),
            "so many failures mean a wrong input rather than a few broken files; nothing was built.",
            "repair them (listed in OUT.quarantine.jsonl), or allow more: -o max_failures=0.2",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.bad, self.seen, self.total, self.max_failures, self.failures)
