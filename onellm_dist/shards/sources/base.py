"""The contract of a source: one module (or package) of this folder, found by its `SOURCE`.

A source says which samples a dataset has and where their bytes lie. The builder (`shards/build/`)
does everything else: it reads, checks, filters and de-duplicates samples, cuts shards, shares the
work among processes, resumes, and records what was left out.

    SOURCE = Source(name="laion400m", summary="...", plan=plan, raw_samples=raw_samples, ...)

    def plan(inputs: Path, *, seed: int, **options) -> DatasetDescription:
        # called once per build: what there is, in an order that never changes

    def raw_samples(
        inputs: Path, description: SplitDescription, **options
    ) -> Iterator[RawSample]:
        # the samples of one input split, in their order

*Input splits.* An InputSplit is a part of the input that can be read by itself, of about 1,000 to
10,000 samples: one img2dataset tar, or rows 20,000 to 30,000 of a CSV (with the byte offset of the
first row, so that no process reads the rows before it). Its `description` is JSON and holds
everything that `raw_samples` needs, with paths relative to `inputs`; it is stored in the plan file.
List input splits in sorted order, never in that of the file system. `count` is the exact number of
raw samples, bad ones included, if it is known without reading the split. If it is None, the builder
reads the split once to count them.

*Raw samples* of equal description and options must be equal, in every process and on every machine:
no clock, no `hash()`, no order of sets. They are made lazily, by a generator; do not read media to
list them. They must be picklable. A sample that is known to be bad is yielded too. Set `problem` if
it is a failure (a row that cannot be parsed, a missing file): the sample goes to quarantine.jsonl
and counts towards `max_failures`. Set `skip` if it is left out on purpose (`status
failed_to_download`, a blacklist, a split that is not wanted): it is only counted, by reason. Keep
reasons short, with their category before the first colon: `missing file: videos/a/1.mp4`. Keys are
unique in the dataset; a repeated key is a failure of the later sample.

Media that decode what they read (a window of a recording) do so within
`onellm_dist.common.workers.sandbox.decoding()`, so that the limits of a sample hold for it, and
load what all samples share within `unlimited()`. Files that are cached open must be opened once a
process (compare `os.getpid()`): workers are forked.

*Inputs.* `inputs` is a `pathlib.Path`, or for URLs (`s3://...`, `memory://...`) a `RemotePath`
(shards/storage/paths.py) with the same methods. Use only these: `/`, name, stem, suffix, parent,
open("rb" or text), read_bytes, read_text, exists, is_file, is_dir, iterdir, glob, rglob,
stat().st_size. Do not convert it with `Path(...)` or `str` to open a file. Data that several splits
share (a caption table) is cached per process with functools.lru_cache on `inputs`, which is
hashable. `options` arrive complete and converted, the source's own and no others.

*Text.* `caption` becomes `.txt`. `meta` becomes `.json` (sorted keys): `conversations` goes there,
`caption` too if a sample has several texts, and anything else that is worth keeping (url,
similarity, window). The builder's filters read these keys of `meta`, in upper or lower case: `url`,
`nsfw`, `punsafe`, `pwatermark`, `similarity`, `width`, `height`, `sha256`. Parts that are called
`txt` and `json` are stored as they are, unless `caption` and `meta` are given too.

A source that generates its data (toyworld) has `build` instead of `plan` and `raw_samples`:
`build(inputs, out, *, workers, seed, **options)` writes one dataset into `out`, or several in
subfolders of it, and returns a BuildReport. `out` is a new, empty staging folder. `build_dataset`
renames it when the function returns, and removes it when the function raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.shards.storage.paths import translate_store_errors

SplitDescription = Mapping[str, Any]
"""What `raw_samples` needs to find the samples of one InputSplit.

JSON values; paths are relative to the inputs."""


@runtime_checkable
class Media(Protocol):
    """Where the bytes of one part come from.

    A Path, a FileRange, or a source's own frozen dataclass with `read_bytes`.
    """

    def read_bytes(self) -> bytes:
        """Read the complete part.

        Raises:
            OSError: the file is missing or cannot be read.
            BadSampleError: the content cannot be used; the sample is left out for this reason.
        """
        ...


class BadSampleError(SampleError):
    """Why a sample is left out.

    `what` is the reason in one line, with its category before the first colon.
    """


@dataclass(frozen=True)
class FileRange:
    """A range of bytes of a file, such as a member of an uncompressed tar."""

    path: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Read the range.

        Raises:
            BadSampleError: the file ends before the end of the range.
        """
        with translate_store_errors(self.path), self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise BadSampleError(
                f"truncated file: {self.path.name} has {len(data)} of {self.size} bytes "
                f"at offset {self.offset}"
            )
        return data


@dataclass(frozen=True)
class RawSample:
    """One sample before it is read."""

    key: str
    """Unique in the dataset; no dot after the last slash (`make_safe_key` makes one of a path)."""
    where: str
    """Where the user finds a bad sample: a file, a line of a table (`a.csv:17`), a tar member."""
    parts: Mapping[str, Media] = field(default_factory=dict)
    """Extension to media: lower-case (`jpg`, `depth.png`); `txt` and `json` are text."""
    caption: str | None = None
    """The text that goes to `.txt`."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The values that go to `.json`."""
    problem: str | None = None
    """Why the sample is already known to be bad: it is quarantined and counts as a failure."""
    skip: str | None = None
    """Why the sample is left out on purpose: it is counted by reason and is not a failure."""


@dataclass(frozen=True)
class InputSplit:
    """A part of the input that is read by itself."""

    name: str
    """Name in messages and in the plan: `00017.tar`, `results_2M_train.csv:20001`."""
    description: SplitDescription
    """Everything that `raw_samples` needs, as JSON."""
    split: str = "train"
    count: int | None = None
    """Number of raw samples, bad and skipped ones included; None: unknown until it is read."""


@dataclass(frozen=True)
class DatasetDescription:
    """What a source found in its input."""

    modalities: tuple[str, ...]
    """The modalities that every sample has; () for text alone."""
    input_splits: Iterable[InputSplit]
    """The parts of the input, in an order that depends on input and options alone."""
    notes: tuple[str, ...] = ()
    """Lines for the user, such as files that were ignored."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Values for the manifest, as JSON."""


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Option:
    """One option of a source, given on the command line or in a dataset recipe."""

    default: Any
    help: str
    kind: type = str
    """str, int, float, bool or Path. Text from a command line is converted to it."""
    separator: str | None = None
    """What stands between several values in the text; None: there is one value. A dataset recipe
    may give a list of them."""

    def convert(self, name: str, value: Any) -> Any:
        """Convert a value to this option's type; None stays None if that is the default.

        Args:
            name: the option's name, for the error.
            value: what the user gave.

        Raises:
            UsageError: the value cannot be converted.
        """
        if value is None and self.default is None:
            return None
        if isinstance(value, (list, tuple)) and self.separator is not None:
            value = self.separator.join(map(str, value))
        try:
            if isinstance(value, (list, tuple, dict)):
                raise ValueError
            if self.kind is bool and not isinstance(value, bool):
                return _BOOLEANS[str(value).lower()]
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
    """A sample that was left out as bad, with the reason."""

    key: str
    file: str
    reason: str


@dataclass(frozen=True)
class DamagedSample:
    """A sample that is used although a part of its media is missing, with what is missing."""

    key: str
    file: str
    damage: str


@dataclass(frozen=True)
class BuildReport:
    """The result of a build."""

    samples: int
    quarantined: tuple[QuarantinedSample, ...] = ()
    """Bad samples, at most the first 100,000; quarantine.jsonl lists all of them."""
    notes: tuple[str, ...] = ()
    """Lines for the user, such as files that were ignored."""
    failures: int = 0
    """Number of bad samples."""


@dataclass(frozen=True)
class Source:
    """A format of input that shards are built from: `plan` and `raw_samples`, or `build`."""

    name: str
    summary: str
    build: Callable[..., BuildReport | None] | None = None
    """(inputs: Path | None, out: Path, *, workers: int, seed: int, **options) -> report or None."""
    plan: Callable[..., DatasetDescription] | None = None
    """(inputs: Path, *, seed: int, **options) -> DatasetDescription.

    Raises UsageError if the input is not what the source reads."""
    raw_samples: Callable[..., Iterator[RawSample]] | None = None
    """(inputs: Path, description: SplitDescription, **options) -> the split's raw samples.

    An exception other than OSError and OneLLMError is a bug of the source."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """The source's own options.

    Every planned source also has the builder's (shards/build/settings.py): name, licence, check,
    max_failures, max_samples, max_bytes, limit, resize, quality, dedup, denylist, nsfw,
    max_punsafe, max_pwatermark, ..."""
    places: tuple[str, ...] = ()
    """Options, besides those of kind Path, that name folders or URLs where media may lie."""
    own_keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of the builder's option `describe` that hold for what this source reads, not for what it
    stores, with the option of its own that says the same."""
    licence: str = "unknown"
    """The licence in the manifest, unless the user gives one."""
    reads_as_stored: bool = False
    """Whether the media are the input's bytes. False: reading decodes some of them (a window of a
    recording, a model's map), and is done in worker processes even with `check=false`."""
    official_count: Callable[[str, int], int | None] | None = None
    """For a benchmark: (split, questions that were found) -> the official number of questions that
    these are, or are a part of; None: it is not known."""
    needs_input: bool = True
    """Whether there is an input; if false, `inputs` is None (generated data)."""
