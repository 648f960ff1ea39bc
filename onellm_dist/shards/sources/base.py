"""The contract of a source: one module (or package) of this folder is one source, found by its `SOURCE`.

A source says what there is, and where its bytes lie; the builder (shards/command.py) does everything else: it reads, checks,
filters, de-duplicates, cuts shards, shares the work among processes, resumes, and keeps account of what was left out.

    SOURCE = Source(name="laion400m", summary="...", plan=plan, raw_samples=raw_samples, options={...}, licence="...")

    def plan(inputs: Path, *, seed: int, **options) -> DatasetDescription       # once a build: what there is, in an order that never changes
    def raw_samples(inputs: Path, description: SplitDescription, **options) -> Iterator[RawSample]    # of one group, in its order

*Groups.* A InputSplit is a stretch of the input that can be read by itself, of about 1,000 to 10,000 samples: one img2dataset
tar, rows 20,000 to 30,000 of a CSV (with the byte offset of its first row, so that no process reads the rows before it). Its
`description` is JSON and holds all that `raw_samples` needs, paths relative to `inputs`; it is stored in the plan file. List groups in
sorted order, never in that of the file system. `count` is the exact number of raw_samples, bad ones included, where that is
known without reading the group; None: the builder goes through the group once and counts.

*Candidates* of equal description and options must be equal, in every process and on every machine: no clock, no `hash()`, no order of
sets. They are made lazily (a generator): do not read media to list them. They must be picklable. What is known to be bad is
still yielded: with `problem` where it is a failure (a row that cannot be parsed, a missing file), which goes to quarantine.jsonl
and counts toward `max_failures`; with `skip` where it is left out knowingly (`status failed_to_download`, a blacklist,
a split that is not wanted), which is only counted by reason. Keep reasons short with the kind before the first colon:
`missing file: videos/a/1.mp4`. Keys are unique in the dataset (a repeated key is a failure of the later one).

*Inputs.* `inputs` is a `pathlib.Path`, or for URLs (`s3://...`, `memory://...`) a `RemotePath` (shards/storage/paths.py) with the same
methods. Use only these of it: `/`, name, stem, suffix, parent, open("rb" or text), read_bytes, read_text, exists, is_file,
is_dir, iterdir, glob, rglob, stat().st_size. Make neither a `Path(...)` nor a `str` of it to open a file. What several groups
share (a caption table) is cached a process with functools.lru_cache on `inputs` (hashable). `options` arrive complete and of
the right type, the source's own and no others.

*Text.* `caption` becomes `.txt`. `meta` becomes `.json` (sorted keys): `conversations` goes there, `caption` too where a sample
has several texts; anything else that is worth keeping (url, similarity, window). The builder's filters read `meta`,
whatever the case of the key: `url`, `nsfw`, `punsafe`, `pwatermark`, `similarity`, `width`, `height`, `sha256`. Parts named
`txt` and `json` in `parts` are stored as they are instead (`caption` and `meta` go before them).

A source that makes its data itself (toyworld) has `build` instead of `plan` and `raw_samples`:
`build(inputs, out, *, workers, seed, **options)` writes one dataset into `out`, or several in subfolders of it, and returns a
BuildReport. `out` is a new, empty staging folder: `build_dataset` renames it when the function returns, and removes it when it
raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.shards.storage.paths import translate_store_errors

SplitDescription = Mapping[str, Any]
"""What `raw_samples` needs to find the samples of one InputSplit: JSON values, paths relative to the inputs."""


@runtime_checkable
class Media(Protocol):
    """Where the bytes of one part come from: a Path, FileRange, or a source's own frozen dataclass with `read_bytes`."""

    def read_bytes(self) -> bytes:
        """The whole part. Raises FileNotFoundError, another OSError, or BadSampleError (the reason to leave the sample out)."""
        ...


class BadSampleError(SampleError):
    """Why a raw_sample is left out: `what` is the reason, one line, its kind before the first colon."""


@dataclass(frozen=True)
class FileRange:
    """Some bytes of a file: a member of an uncompressed tar."""

    path: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        with translate_store_errors(self.path), self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise BadSampleError(
                f"truncated file: {self.path.name} has {len(data)} of {self.size} bytes at offset {self.offset}"
            )
        return data


@dataclass(frozen=True)
class RawSample:
    """One sample before it is read."""

    key: str
    """Unique in the dataset; no dot behind its last slash (`naming.make_safe_key` makes one of a path)."""
    where: str
    """What the user looks for when it is bad: a file, a table's line (`a.csv:17`), a tar's member."""
    parts: Mapping[str, Media] = field(default_factory=dict)
    """Part extension (lower-case: `jpg`, `depth.png`) to where its bytes come from; `txt` and `json` are text, others media."""
    caption: str | None = None
    """Goes to `.txt`."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Goes to `.json`."""
    problem: str | None = None
    """Already known to be bad: quarantined with this reason, counts as a failure."""
    skip: str | None = None
    """Left out knowingly: counted by reason, no failure."""


@dataclass(frozen=True)
class InputSplit:
    """A stretch of the input that is read by itself."""

    name: str
    """For messages and the plan: `00017.tar`, `results_2M_train.csv:20001`."""
    description: SplitDescription
    """JSON; all that `raw_samples` needs."""
    split: str = "train"
    count: int | None = None
    """Its raw_samples, bad and skipped ones included; None: not known before it was read."""


@dataclass(frozen=True)
class DatasetDescription:
    """What a source found in its input."""

    modalities: tuple[str, ...]
    """Every sample has exactly these; () is text only."""
    input_splits: Iterable[InputSplit]
    """In an order that depends on the input and the options alone."""
    notes: tuple[str, ...] = ()
    """Lines for the user, such as files that were ignored."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest (JSON)."""


@dataclass(frozen=True)
class Option:
    """One option of a source, as the command line and dataset recipes give it."""

    default: Any
    help: str
    kind: type = str
    """str, int, float, bool, or Path. A text (from a command line) is converted to it."""

    def convert(self, name: str, value: Any) -> Any:
        """`value` as this option's type; None stays None where that is the default.

        Raises:
            UsageError: it cannot be converted.
        """
        if value is None and self.default is None:
            return None
        try:
            if self.kind is bool and not isinstance(value, bool):
                return {
                    "true": True,
                    "yes": True,
                    "1": True,
                    "false": False,
                    "no": False,
                    "0": False,
                }[str(value).lower()]
            if self.kind is int and isinstance(value, float) and not value.is_integer():
                raise ValueError
            return self.kind(value)
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"option {name}={value!r} is not of type {self.kind.__name__}.",
                self.help,
                f"the default is {self.default!r}.",
            ) from None


@dataclass(frozen=True)
class QuarantinedSample:
    """One sample that was left out, with the reason."""

    key: str
    file: str
    reason: str


@dataclass(frozen=True)
class BuildReport:
    """What was built."""

    samples: int
    quarantined: tuple[QuarantinedSample, ...] = ()
    """The bad samples; of very many, the first 100,000 (quarantine.jsonl has them all)."""
    notes: tuple[str, ...] = ()
    """Lines for the user, such as files that were ignored."""
    failures: int = 0
    """All bad samples."""


@dataclass(frozen=True)
class Source:
    """A kind of input that shards are built from: `plan` and `raw_samples`, or `build`."""

    name: str
    summary: str
    build: Callable[..., BuildReport | None] | None = None
    """(inputs: Path | None, out: Path, *, workers: int, seed: int, **options); None returned: nothing to report."""
    plan: Callable[..., DatasetDescription] | None = None
    """(inputs: Path, *, seed: int, **options) -> DatasetDescription. Raises UsageError where the input is not what the source reads."""
    raw_samples: Callable[..., Iterator[RawSample]] | None = None
    """(inputs: Path, description: SplitDescription, **options) -> the group's raw_samples. An error other than OSError and
    OneLLMError is a fault of the source."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """Its own. Every planned source also has the builder's (shards/build/settings.py): name, licence, check, max_failures,
    max_samples, max_bytes, limit, resize, quality, dedup, denylist, nsfw, max_punsafe, max_pwatermark, ..."""
    licence: str = "unknown"
    """Of the manifest, where the user gives none."""
    needs_input: bool = True
    """False: `inputs` is None (generated data)."""
