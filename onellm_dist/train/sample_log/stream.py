"""The stream of a run in both directions: the samples of a step, and the steps of a sample.

Both follow from the data phases of the run and the indexes of its shards: order and mixture are
pure functions with inverses, so no step is replayed. No tokenizer, model or torch is needed, and
nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.progress import progress
from onellm_dist.common.run_files import CONFIG, DATA_PHASES, DATASETS, SAMPLES
from onellm_dist.data.mixture import Mixture
from onellm_dist.data.order import Order, derive_key
from onellm_dist.data.phases import DataPhase, compute_shards_fingerprint, count_consumed
from onellm_dist.shards.format.dataset import Dataset, ShardInfo, open_dataset
from onellm_dist.train.records.data_phases import read_data_phases
from onellm_dist.train.records.old_runs import check_run_directory
from onellm_dist.train.sample_log.run_recipe import read_recorded_locations, read_run_recipe

MANY_SHARDS = 200
"""A search through more indexes than this shows its progress."""
SHOWN = 5
"""Number of candidates that the message about an ambiguous key names."""
MOST_EPOCHS = 1_000_000
"""No run reads a dataset more often."""


class UnopenedDatasetError(UsageError):
    """A dataset of the run cannot be opened now."""


class StoredSample(NamedTuple):
    """One sample of a dataset, by place and by name."""

    dataset: str
    shard: int
    """Index among the shards of the run's split."""
    row: int
    """Row in the index of the shard."""
    shard_name: str
    key: str

    @property
    def name(self) -> str:
        """The sample's id without its epoch."""
        return f"{self.dataset}/{self.shard_name}/{self.key}"


class SampleUse(NamedTuple):
    """A sample in a step."""

    step: int
    epoch: int
    sample: StoredSample

    @property
    def sample_id(self) -> str:
        """The sample's id, `dataset/shard-name/key@epoch`."""
        return f"{self.sample.name}@{self.epoch}"


@dataclass(frozen=True)
class _PhaseSteps:
    """The steps of one data phase."""

    data_phase: DataPhase
    end: int
    """Index of the step after the last one."""
    mixture: Mixture
    consumed: dict[str, int]
    """Dataset -> samples of its order that earlier data phases took."""


class RunStream:
    """The stream of a run, up to its last step.

    Args:
        run_dir: the run directory.

    Raises:
        UsageError: it is not a run directory, it is one of 0.1.0, or nothing was started in it.
    """

    def __init__(self, run_dir: Path) -> None:
        check_run_directory(run_dir)
        folder = run_dir / SAMPLES
        try:
            data_phases = read_data_phases(folder)
            recipe = read_run_recipe(run_dir / CONFIG)
        except FileNotFoundError as error:
            raise UsageError(
                f"{error.filename}: no such file",
                f"the samples of a run are computed from its {CONFIG} and {SAMPLES}/{DATA_PHASES}.",
                "give a run directory (run.dir) in which training has started.",
            ) from None
        self.steps = recipe.steps
        """Optimizer steps of the whole run, by its recipe."""
        self._locations = {
            **recipe.locations,
            **read_recorded_locations(folder / DATASETS),
        }
        self._open: dict[str, tuple[Dataset, tuple[ShardInfo, ...], Order]] = {}
        ends = [*(data_phase.start for data_phase in data_phases[1:]), self.steps]
        self._phases = [
            _PhaseSteps(
                data_phase,
                end,
                Mixture.from_counts(list(data_phase.counts.values())),
                count_consumed(data_phases[:number], data_phase.start),
            )
            for number, (data_phase, end) in enumerate(zip(data_phases, ends, strict=True))
        ]

    @cached_property
    def names(self) -> list[str]:
        """Every dataset of any data phase."""
        return list(dict.fromkeys(name for p in self._phases for name in p.data_phase.counts))

    def get_modalities(self, dataset: str) -> tuple[str, ...]:
        """The modalities of a dataset's samples; () is text only."""
        return self._open_dataset(dataset)[0].modalities

    def list_samples(self, step: int) -> list[SampleUse]:
        """The global batch of a step, in stream order.

        Raises:
            UsageError: the run has no such step.
        """
        if not 0 <= step < self.steps:
            raise UsageError(
                f"step {step} is not in this run",
                f"it has steps 0 .. {self.steps - 1} (train.steps).",
                "give one of them.",
            )
        phase = next(p for p in reversed(self._phases) if p.data_phase.start <= step)
        count = phase.data_phase.global_batch
        first = (step - phase.data_phase.start) * count
        numbers, index = phase.mixture.locate(np.arange(first, first + count, dtype=np.int64))
        found: list[SampleUse | None] = [None] * count
        for number, name in enumerate(phase.data_phase.counts):
            here = np.flatnonzero(numbers == number)
            if not here.size:
                continue
            order = self._open_dataset(name)[2]
            places = order.locate(index[here] + phase.consumed.get(name, 0))
            by_shard = np.lexsort((places.row, places.shard))
            for i in by_shard.tolist():
                sample = self._get_sample(name, int(places.shard[i]), int(places.row[i]))
                found[int(here[i])] = SampleUse(step, int(places.epoch[i]), sample)
        return [use for use in found if use is not None]

    def list_uses(self, sample: StoredSample) -> list[SampleUse]:
        """Every use of a sample in the run, in order of steps.

        Raises:
            UsageError: they are more than can be listed.
        """
        order = self._open_dataset(sample.dataset)[2]
        found: list[SampleUse] = []
        for phase in self._phases:
            start, count = phase.data_phase.start, phase.data_phase.global_batch
            names = list(phase.data_phase.counts)
            if sample.dataset not in names or phase.end <= start:
                continue
            number = names.index(sample.dataset)
            first = phase.consumed.get(sample.dataset, 0)
            taken = phase.mixture.count_taken((phase.end - start) * count)[number]
            last_epoch = (first + taken - 1) // order.size
            if last_epoch - first // order.size > MOST_EPOCHS:
                raise UsageError(
                    f"{sample.name} is used {last_epoch - first // order.size} times from step "
                    f"{start} to step {phase.end}",
                    f"that is too often to list: the steps in {CONFIG} or {DATA_PHASES} are wrong.",
                    "restore the file from a copy.",
                )
            epochs = np.arange(first // order.size, last_epoch + 1, dtype=np.int64)
            positions = order.find_positions(sample.shard, sample.row, epochs)
            inside = (positions >= first) & (positions < first + taken)
            in_phase = phase.mixture.find_positions(number, positions[inside] - first)
            steps = start + in_phase // count
            found += [
                SampleUse(step, epoch, sample)
                for step, epoch in zip(steps.tolist(), epochs[inside].tolist(), strict=True)
            ]
        return sorted(found, key=lambda use: (use.step, use.epoch))

    def has_shard(self, name: str) -> bool:
        """Whether `name` is `dataset/shard` of a shard that the run reads."""
        dataset, _, shard = name.partition("/")
        return dataset in self.names and any(
            info.name == shard for info in self._open_dataset(dataset)[1]
        )

    def find_sample(self, key: str) -> StoredSample:
        """Find the sample that `key` names.

        Args:
            key: `dataset/shard/key`, `shard/key` or `key`, or the beginning of one of these where
                only one sample has it.

        Raises:
            UsageError: no sample has this name, or several have.
        """
        exact: list[StoredSample] = []
        partial: list[StoredSample] = []
        for sample, is_exact in self._find_candidates(key):
            (exact if is_exact else partial).append(sample)
            if len(exact) > SHOWN:
                break
        found = exact or partial
        if len(found) == 1:
            return found[0]
        if not found:
            raise UsageError(
                f"no sample {key!r} in {', '.join(self.names)}",
                "an id is dataset/shard/key, as in `onellm samples RUN --step 0`.",
                "check the key; its beginning is enough where only one sample has it.",
            )
        shown = ", ".join(sample.name for sample in found[:SHOWN])
        raise UsageError(
            f"{key!r} may be {shown}{' ...' if len(found) > SHOWN else ''}",
            "the steps of one sample are shown.",
            "give more of its id.",
        )

    def _find_candidates(self, key: str) -> Iterator[tuple[StoredSample, bool]]:
        """Samples whose id has `key` at dataset, shard or key, and whether it ends there."""
        shards = [
            (name, number, info)
            for name in self.names
            for number, info in enumerate(self._open_dataset(name)[1])
        ]
        named = [
            (*entry, prefix)
            for entry in shards
            for prefix in _match_shard(key, entry[0], entry[2].name)
        ]
        # A key without a shard is looked up in every index.
        wanted = named or [(*entry, "") for entry in shards]
        with progress(
            len(wanted), "Searching the shards", unit="shards", enabled=len(wanted) > MANY_SHARDS
        ) as bar:
            for name, number, info, prefix in wanted:
                rest = key.removeprefix(prefix) if key.startswith(prefix) else ""
                keys = self._open_dataset(name)[0].index(info).keys()
                matches = [(len(own), row) for row, own in enumerate(keys) if own.startswith(rest)]
                for _, row in sorted(matches)[: SHOWN + 1]:
                    sample = StoredSample(name, number, row, info.name, keys[row])
                    yield sample, keys[row] == rest
                bar.advance(1)

    def _get_sample(self, name: str, shard: int, row: int) -> StoredSample:
        dataset, shards, _ = self._open_dataset(name)
        key = dataset.index(shards[shard]).key(row)
        return StoredSample(name, shard, row, shards[shard].name, key)

    def _open_dataset(self, name: str) -> tuple[Dataset, tuple[ShardInfo, ...], Order]:
        if name not in self._open:
            phase = next(p.data_phase for p in self._phases if name in p.data_phase.counts)
            self._open[name] = self._open_shards(name, phase)
        return self._open[name]

    def _open_shards(
        self, name: str, data_phase: DataPhase
    ) -> tuple[Dataset, tuple[ShardInfo, ...], Order]:
        if name not in self._locations:
            raise OneLLMError(
                f"the location of dataset {name} is not recorded in this run",
                f"{CONFIG} no longer names it either.",
                f'add it to {SAMPLES}/{DATASETS}: {{"{name}": "/path/to/{name}"}}.',
            )
        # The run's recipe decided about links when the run read the dataset.
        try:
            dataset = open_dataset(self._locations[name], follow_links=True)
            shards = dataset.shards(data_phase.split)
        except OneLLMError as error:
            raise UnopenedDatasetError(error.what, error.why, error.do) from error
        if compute_shards_fingerprint(shards) != data_phase.shards[name]:
            raise OneLLMError(
                f"dataset {self._locations[name]}: its shards are not those that the run reads",
                "other samples have their places now, so the answer would be wrong.",
                f"restore the shards, or give their location in {SAMPLES}/{DATASETS}.",
            )
        key = derive_key("order", data_phase.seed, name)
        return dataset, shards, Order([shard.samples for shard in shards], key)


def _match_shard(key: str, dataset: str, shard: str) -> list[str]:
    """The beginning of the ids of a shard's samples, as far as `key` names the shard; else []."""
    if "/" not in key:
        return []
    prefixes = (f"{dataset}/{shard}/", f"{shard}/")
    return [p for p in prefixes if key.startswith(p) or p.startswith(key)][:1]
