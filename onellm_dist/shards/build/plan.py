"""The plan of a build: which raw_samples go to which output shard, written once and read by every process.

`plan.json` holds the settings and the table of groups, `groups.jsonl` a group's description a line (reached by byte offset, so that
a folder's million file names are not parsed by every process). A ShardTask is one output shard: a range of `max_samples`
consecutive raw_samples of one split. Which raw_samples they are follows from the plan alone, so any process can build any unit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from typing import Any, NamedTuple

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.progress import progress
from onellm_dist.shards.build.images import picture_extensions
from onellm_dist.shards.build.settings import Settings
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.storage.paths import StoragePath, write

PLAN, GROUPS = "plan.json", "groups.jsonl"
VERSION = 3
"""2: the settings have max_pwatermark. 3: groups of a picture tree hold names, and the denylist's SHA-256 is kept."""


class GroupRow(NamedTuple):
    """A group in the plan's table."""

    name: str
    split: str
    samples: int
    offset: int
    """Of its description in groups.jsonl."""
    length: int


class Piece(NamedTuple):
    """Candidates start .. stop - 1 of a group."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardTask:
    """One output shard."""

    number: int
    """StoragePath in the plan."""
    split: str
    shard: int
    """Number in its split."""
    pieces: tuple[Piece, ...]

    @property
    def raw_samples(self) -> int:
        """How many it has, bad ones included."""
        return sum(p.stop - p.start for p in self.pieces)


@dataclass(frozen=True)
class Plan:
    """Everything that decides the output's bytes, beside the input's bytes."""

    source: str
    inputs: str
    seed: int
    options: Mapping[str, Any]
    """The source's own, as JSON values."""
    settings: Settings
    modalities: tuple[str, ...]
    notes: tuple[str, ...]
    attributes: Mapping[str, Any]
    groups: tuple[GroupRow, ...]
    denylist_sha256: str | None = None
    """Of the denylist's bytes: a changed list is another build."""

    @cached_property
    def units(self) -> tuple[ShardTask, ...]:
        """All output shards, in plan order: splits in order of first appearance, raw_samples in the groups' order."""
        units: list[ShardTask] = []
        for split in dict.fromkeys(g.split for g in self.groups):
            open_pieces, held, shard = list[Piece](), 0, 0
            for number, group in enumerate(self.groups):
                start = 0
                while group.split == split and start < group.samples:
                    stop = min(group.samples, start + self.settings.max_samples - held)
                    open_pieces.append(Piece(number, start, stop))
                    held += stop - start
                    start = stop
                    if held == self.settings.max_samples:
                        units.append(ShardTask(len(units), split, shard, tuple(open_pieces)))
                        open_pieces, held, shard = [], 0, shard + 1
            if open_pieces:
                units.append(ShardTask(len(units), split, shard, tuple(open_pieces)))
        return tuple(units)

    @cached_property
    def total(self) -> int:
        """Candidates."""
        return sum(g.samples for g in self.groups)

    def request(self) -> dict[str, Any]:
        """What the user asked for; a build is resumed only by an equal request."""
        return as_request(
            self.source, self.inputs, self.seed, self.options, self.settings, self.denylist_sha256
        )

    def to_bytes(self) -> bytes:
        """plan.json."""
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
        lines = ",\n".join("  " + json.dumps(g) for g in self.groups)
        return (
            json.dumps(head, sort_keys=True)[:-1] + ', "groups": [\n' + lines + "\n]}\n"
        ).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Parses plan.json.

        Raises:
            OtherVersion: of another version.
        """
        raw = json.loads(data)
        if raw["version"] != VERSION:
            raise OtherVersion(
                f"the unfinished build has a plan of version {raw['version']}; this program makes {VERSION}.",
                "it cannot be continued.",
                "finish it with the program that began it, or start again with --overwrite.",
            )
        return cls(
            raw["source"],
            raw["inputs"],
            raw["seed"],
            raw["options"],
            Settings.from_json(raw["settings"]),
            tuple(raw["modalities"]),
            tuple(raw["notes"]),
            raw["attributes"],
            tuple(GroupRow(*g) for g in raw["groups"]),
            raw["denylist_sha256"],
        )

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of plan.json: done records carry it, so that none of another plan is taken for this one's."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class OtherVersion(UsageError):
    """A plan of another version of this program."""


def as_request(
    source: str,
    inputs: str,
    seed: int,
    options: Mapping[str, Any],
    settings: Settings,
    denylist_sha256: str | None,
) -> dict[str, Any]:
    """What decides the samples of a build (`energon` only adds files, and may change while it is unfinished)."""
    kept = {k: v for k, v in settings.to_json().items() if k != "energon"}
    return {
        "source": source,
        "inputs": inputs,
        "seed": seed,
        "options": dict(options),
        **kept,
        "denylist_sha256": denylist_sha256,
    }


def json_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A source's options as JSON values (paths become texts)."""
    return {
        k: v if isinstance(v, (str, int, float, bool, type(None))) else str(v)
        for k, v in options.items()
    }


def make_plan(
    source: Source,
    inputs: StoragePath,
    *,
    seed: int,
    options: Mapping[str, Any],
    settings: Settings,
    workers: int,
) -> tuple[Plan, bytes]:
    """(the plan, the bytes of groups.jsonl).

    Raises:
        UsageError: the input is not what the source reads, or has nothing in it; `dedup` compares what its samples do not have.
    """
    assert source.plan is not None
    described: DatasetDescription = source.plan(inputs, seed=seed, **options)
    if settings.dedup == "perceptual" and not picture_extensions(described.modalities):
        raise UsageError(
            f"dedup=perceptual, and samples of {', '.join(described.modalities) or 'text'} have no picture of their own.",
            "near copies are found by the picture that a whole sample is; without one all samples would look alike.",
            "use dedup=exact.",
        )
    groups = _counted(
        source, inputs, list(_until(described.input_splits, settings.limit)), options, workers
    )
    groups = [g for g in _limited(groups, settings.limit) if g.count]
    if not groups:
        raise UsageError(
            f"{inputs}: source {source.name!r} found no samples there.",
            "there is nothing to build from.",
            "check the path.",
        )
    rows, lines, offset = list[GroupRow](), list[bytes](), 0
    for group in groups:
        line = json.dumps(group.description, sort_keys=True).encode("ascii") + b"\n"
        rows.append(GroupRow(group.name, group.split, group.count or 0, offset, len(line)))
        lines.append(line)
        offset += len(line)
    plan = Plan(
        source.name,
        str(inputs),
        seed,
        json_options(options),
        settings,
        described.modalities,
        described.notes,
        dict(described.attributes),
        tuple(rows),
        settings.denylist_sha256(),
    )
    return plan, b"".join(lines)


def _until(groups: Iterable[InputSplit], limit: int | None) -> Iterator[InputSplit]:
    """No more groups than hold `limit` raw_samples for certain."""
    known = 0
    for group in groups:
        yield group
        known += group.count or 0
        if limit is not None and known >= limit:
            return


def _limited(groups: Sequence[InputSplit], limit: int | None) -> Iterator[InputSplit]:
    left = limit
    for group in groups:
        if left is None:
            yield group
        else:
            yield replace(group, count=min(left, group.count or 0))
            left -= min(left, group.count or 0)


def _counted(
    source: Source,
    inputs: StoragePath,
    groups: list[InputSplit],
    options: Mapping[str, Any],
    workers: int,
) -> list[InputSplit]:
    """Every group with its count; those that do not know it are gone through."""
    unknown = [i for i, g in enumerate(groups) if g.count is None]
    if not unknown:
        return groups
    jobs = [(source.name, inputs, groups[i].description, dict(options)) for i in unknown]
    with progress(len(jobs), "Counting samples", unit="groups") as bar:
        if workers == 1 or len(jobs) < 2 * workers:
            for i, job in zip(unknown, jobs, strict=True):
                groups[i] = replace(groups[i], count=count_group(*job))
                bar.advance()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for i, count in zip(
                    unknown,
                    pool.map(count_group, *zip(*jobs, strict=True), chunksize=4),
                    strict=True,
                ):
                    groups[i] = replace(groups[i], count=count)
                    bar.advance()
    return groups


def count_group(
    source: str, inputs: StoragePath, description: SplitDescription, options: Mapping[str, Any]
) -> int:
    """Candidates of one group, by going through it."""
    from onellm_dist.shards.build.registry import get_source

    raw_samples = get_source(source).raw_samples
    assert raw_samples is not None
    return sum(1 for _ in raw_samples(inputs, description, **options))


def save_plan(folder: StoragePath, plan: Plan, groups: bytes) -> None:
    """Writes groups.jsonl, and plan.json last: where it stands, both are whole."""
    write(folder / GROUPS, groups)
    write(folder / PLAN, plan.to_bytes())


def load_plan(folder: StoragePath) -> Plan | None:
    """The plan of an unfinished build; None: there is none.

    Raises:
        OtherVersion: it is one of another version.
    """
    try:
        return Plan.from_bytes((folder / PLAN).read_bytes())
    except FileNotFoundError:
        return None


def unit_raw_samples(
    unit: ShardTask,
    plan: Plan,
    folder: StoragePath,
    inputs: StoragePath,
    options: Mapping[str, Any],
    raw_samples: Callable[..., Iterator[RawSample]],
) -> Iterator[RawSample]:
    """The unit's raw_samples, in order.

    Raises:
        OneLLMError: a group has fewer or more raw_samples than when the plan was made.
    """
    with (folder / GROUPS).open("rb") as file:
        for piece in unit.pieces:
            group = plan.groups[piece.group]
            file.seek(group.offset)
            description = json.loads(file.read(group.length))
            seen = 0
            rows = raw_samples(inputs, description, **options)
            for seen, raw_sample in enumerate(rows, 1):
                if seen > piece.start:
                    yield raw_sample
                if seen == piece.stop:
                    break
            whole = piece.stop == group.samples and (
                plan.settings.limit is None or piece.group < len(plan.groups) - 1
            )
            if seen < piece.stop or (whole and next(rows, None) is not None):
                raise OneLLMError(
                    f"{group.name}: it has {seen if seen < piece.stop else 'more'} samples where there were {group.samples} when the "
                    "build was planned.",
                    "the input changed under the builder, so shards built before and after would not fit together.",
                    "put the input back, or begin anew with --restart.",
                )
