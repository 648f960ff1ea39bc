"""The plan of a build: which raw samples go to which output shard.

It is written once and read by every process. `plan.json` holds the settings and the table of input
splits, `input_splits.jsonl` the description of one input split a line. A line is reached by byte
offset, so that no process parses the million file names of a folder that others work on.

A ShardTask is one output shard: `max_samples` consecutive raw samples of one split. Which ones they
are follows from the plan alone, so any process can build any shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.build.settings import BuildSettings
from onellm_dist.shards.sources.base import RawSample
from onellm_dist.shards.storage.paths import StoragePath, write_file

PLAN = "plan.json"
INPUT_SPLITS = "input_splits.jsonl"
VERSION = 7
"""2: the settings have max_pwatermark. 3: input splits of a picture tree hold names, and the
denylist's SHA-256 is kept. 4: `input_splits` (was `groups`). 5: the settings have
question and follow. 6: they have sample_seconds and sample_mb. 7: they have describe, and some
sources map_orientation or imu_units."""


class PlannedSplit(NamedTuple):
    """An input split in the plan's table."""

    name: str
    split: str
    samples: int
    """Raw samples, bad ones included."""
    offset: int
    """Where the split's description starts in input_splits.jsonl."""
    length: int
    """Bytes of the split's description."""


class SplitRange(NamedTuple):
    """Raw samples start .. stop - 1 of an input split."""

    input_split: int
    """Position of the input split in the plan's table."""
    start: int
    stop: int


@dataclass(frozen=True)
class ShardTask:
    """One output shard to be built."""

    number: int
    """Position in the plan."""
    split: str
    shard: int
    """Number of the shard in its split."""
    ranges: tuple[SplitRange, ...]

    @property
    def raw_samples(self) -> int:
        """The number of its raw samples, bad ones included."""
        return sum(r.stop - r.start for r in self.ranges)


@dataclass(frozen=True)
class BuildPlan:
    """Everything beside the bytes of the input that determines the bytes of the output."""

    source: str
    inputs: str
    seed: int
    options: Mapping[str, Any]
    """The source's own options, as JSON values."""
    settings: BuildSettings
    modalities: tuple[str, ...]
    notes: tuple[str, ...]
    attributes: Mapping[str, Any]
    input_splits: tuple[PlannedSplit, ...]
    denylist_sha256: str | None = None
    """Digest of the denylist's bytes: a changed list makes another build."""

    @property
    def lists_media(self) -> bool:
        """Whether each sample lists its media (see `Manifest.lists_media`)."""
        return self.attributes.get("media") == "listed"

    @property
    def media_of(self) -> tuple[str, ...] | None:
        """What the samples may have, if they list their media (see `ShardWriter`)."""
        return self.modalities if self.lists_media else None

    @cached_property
    def tasks(self) -> tuple[ShardTask, ...]:
        """All output shards, in plan order.

        Splits come in order of first appearance, raw samples in the order of the input splits.
        """
        tasks: list[ShardTask] = []
        for split in dict.fromkeys(s.split for s in self.input_splits):
            ranges, held, shard = list[SplitRange](), 0, 0
            for number, row in enumerate(self.input_splits):
                start = 0
                while row.split == split and start < row.samples:
                    stop = min(row.samples, start + self.settings.max_samples - held)
                    ranges.append(SplitRange(number, start, stop))
                    held += stop - start
                    start = stop
                    if held == self.settings.max_samples:
                        tasks.append(ShardTask(len(tasks), split, shard, tuple(ranges)))
                        ranges, held, shard = [], 0, shard + 1
            if ranges:
                tasks.append(ShardTask(len(tasks), split, shard, tuple(ranges)))
        return tuple(tasks)

    @cached_property
    def total(self) -> int:
        """The number of raw samples."""
        return sum(s.samples for s in self.input_splits)

    def get_request(self) -> dict[str, Any]:
        """Return what the user asked for; a build is resumed by an equal request only."""
        return make_request_json(
            self.source, self.inputs, self.seed, self.options, self.settings, self.denylist_sha256
        )

    def to_bytes(self) -> bytes:
        """Make plan.json."""
        head = {
            "version": VERSION,
            "source": self.source,
            "inputs": self.inputs,
            "seed": self.seed,
            "options": dict(self.options),
            "settings": self.settings.to_json(),
            "modalities": list(self.modalities),
            "notes": list(self.notes),
            "attributes": dict(self.attributes),
            "denylist_sha256": self.denylist_sha256,
        }
        lines = ",\n".join("  " + json.dumps(s) for s in self.input_splits)
        text = json.dumps(head, sort_keys=True)[:-1] + ', "input_splits": [\n' + lines + "\n]}\n"
        return text.encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes) -> BuildPlan:
        """Parse plan.json.

        Raises:
            PlanVersionError: it has another version.
        """
        raw = json.loads(data)
        if raw["version"] != VERSION:
            raise PlanVersionError(
                f"the unfinished build has a plan of version {raw['version']}; "
                f"this program makes {VERSION}.",
                "it cannot be continued.",
                "finish it with the program that began it, or start again with --overwrite.",
            )
        return cls(
            raw["source"],
            raw["inputs"],
            raw["seed"],
            raw["options"],
            BuildSettings.from_json(raw["settings"]),
            tuple(raw["modalities"]),
            tuple(raw["notes"]),
            raw["attributes"],
            tuple(PlannedSplit(*s) for s in raw["input_splits"]),
            raw["denylist_sha256"],
        )

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of plan.json.

        Task records carry it, so that a record of another plan is not taken for one of this plan.
        """
        return hashlib.sha256(self.to_bytes()).hexdigest()


class PlanVersionError(UsageError):
    """A plan of another version of this program."""


def make_request_json(
    source: str,
    inputs: str,
    seed: int,
    options: Mapping[str, Any],
    settings: BuildSettings,
    denylist_sha256: str | None,
) -> dict[str, Any]:
    """Return what determines the samples of a build.

    `energon` is not part of it: it only adds files, and may change while a build is unfinished.
    """
    kept = {k: v for k, v in settings.to_json().items() if k != "energon"}
    return {
        "source": source,
        "inputs": inputs,
        "seed": seed,
        "options": dict(options),
        **kept,
        "denylist_sha256": denylist_sha256,
    }


def to_json_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a source's options to JSON values: paths become texts."""
    return {
        k: v if isinstance(v, (str, int, float, bool, type(None))) else str(v)
        for k, v in options.items()
    }


def save_plan(folder: StoragePath, plan: BuildPlan, descriptions: bytes) -> None:
    """Write input_splits.jsonl, and plan.json last: where it exists, both are complete."""
    write_file(folder / INPUT_SPLITS, descriptions)
    write_file(folder / PLAN, plan.to_bytes())


def load_plan(folder: StoragePath) -> BuildPlan | None:
    """Load the plan of an unfinished build; None: there is none.

    Raises:
        PlanVersionError: it has another version.
    """
    try:
        return BuildPlan.from_bytes((folder / PLAN).read_bytes())
    except FileNotFoundError:
        return None


def read_raw_samples(
    task: ShardTask,
    plan: BuildPlan,
    folder: StoragePath,
    inputs: StoragePath,
    options: Mapping[str, Any],
    raw_samples: Callable[..., Iterator[RawSample]],
) -> Iterator[RawSample]:
    """Yield the raw samples of a task, in order.

    Args:
        task: one of the plan's.
        plan: the plan of the build.
        folder: where the plan lies.
        inputs: the input of the build.
        options: the source's own options.
        raw_samples: the source's function.

    Raises:
        OneLLMError: an input split has fewer or more raw samples than when the plan was made.
    """
    with (folder / INPUT_SPLITS).open("rb") as file:
        for part in task.ranges:
            planned = plan.input_splits[part.input_split]
            file.seek(planned.offset)
            description = json.loads(file.read(planned.length))
            seen = 0
            rows = raw_samples(inputs, description, **options)
            for seen, raw_sample in enumerate(rows, 1):
                if seen > part.start:
                    yield raw_sample
                if seen == part.stop:
                    break
            to_its_end = part.stop == planned.samples and (
                plan.settings.limit is None or part.input_split < len(plan.input_splits) - 1
            )
            now = format_count(seen, "sample") if seen < part.stop else "more samples"
            if seen < part.stop or (to_its_end and next(rows, None) is not None):
                raise OneLLMError(
                    f"{planned.name}: it has {now}; when "
                    f"the build was planned it had {planned.samples}.",
                    "the input changed under the builder, so shards built before and after would "
                    "not fit together.",
                    "restore the input, or begin anew with --restart.",
                )
