"""What `onellm samples` answers from: the stream of a run, in both directions, and what became of its steps.

Step -> samples and sample -> steps are computed from the data_phases of the plan and the indexes of the shards; order and mixture are
pure functions with inverses, so no step is replayed. What cannot be computed is read from the run directory: skipped_samples, skipped
steps, starts that went further than their last checkpoint. No tokenizer, no model and no torch is needed, nothing is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.progress import progress
from onellm_dist.data.mixture import Mixture
from onellm_dist.data.order import Order, derive_key
from onellm_dist.data.phases import DataPhase, compute_shards_fingerprint, count_consumed
from onellm_dist.shards.format.dataset import Dataset, ShardInfo, open_dataset

MANY_SHARDS = 200
"""A search through more indexes than this shows its progress."""
SHOWN = 5
"""Candidates that an ambiguous key names."""


class Sample(NamedTuple):
    """One sample of a dataset, by place and by name."""

    dataset: str
    shard: int
    """Index among the shards of the run's split."""
    row: int
    shard_name: str
    key: str

    @property
    def name(self) -> str:
        """The sample's id without its epoch."""
        return f"{self.dataset}/{self.shard_name}/{self.key}"


class Use(NamedTuple):
    """A sample in a step."""

    step: int
    epoch: int
    sample: Sample

    @property
    def sample_id(self) -> str:
        """`dataset/shard-name/key@epoch`."""
        return f"{self.sample.name}@{self.epoch}"


@dataclass(frozen=True)
class _Stretch:
    """The steps start .. end - 1 of one data_phase."""

    data_phase: DataPhase
    end: int
    mixture: Mixture
    before: dict[str, int]
    """Dataset -> samples of its order that earlier data_phases took."""


class RunStream:
    """The stream of a run, up to its last step.

    Args:
        run_dir: the run's directory.

    Raises:
        UsageError: it is none, or nothing was started in it yet.
    """

    def __init__(self, run_dir: Path) -> None:
        ledger = run_dir / "ledger"
        try:
            data_phases = [
                DataPhase.from_json(raw)
                for raw in json.loads((ledger / "data_phases.json").read_text(encoding="utf-8"))
            ]
            config: dict[str, Any] = yaml.safe_load(
                (run_dir / "config.yaml").read_text(encoding="utf-8")
            )
        except FileNotFoundError as error:
            raise UsageError(
                f"{error.filename}: no such file",
                "the ledger of a run is computed from its config.yaml and its ledger/data_phases.json.",
                "give a run's directory (run.dir) in which training has started.",
            ) from None
        self.steps = int(config["train"]["steps"])
        """Of the whole run, by its recipe."""
        self._places = _places(ledger / "datasets.json", config)
        self._open: dict[str, tuple[Dataset, tuple[ShardInfo, ...], Order]] = {}
        starts = [data_phase.start for data_phase in data_phases]
        self._stretches = [
            _Stretch(
                data_phase,
                end,
                Mixture.from_counts(list(data_phase.counts.values())),
                count_consumed(data_phases[:number], data_phase.start),
            )
            for number, (data_phase, end) in enumerate(
                zip(data_phases, [*starts[1:], self.steps], strict=True)
            )
        ]

    @cached_property
    def names(self) -> list[str]:
        """Every dataset of any data_phase."""
        return list(
            dict.fromkeys(name for stretch in self._stretches for name in stretch.data_phase.counts)
        )

    def modalities(self, dataset: str) -> tuple[str, ...]:
        """Of a dataset's samples; () is text only."""
        return self._dataset(dataset)[0].modalities

    def samples(self, step: int) -> list[Use]:
        """The global batch of a step, in stream order.

        Raises:
            UsageError: the run has no such step.
        """
        if not 0 <= step < self.steps:
            raise UsageError(
                f"step {step} is not in this run",
                f"it has steps 0 .. {self.steps - 1} (train.steps).",
                "name one of them.",
            )
        stretch = next(
            stretch for stretch in reversed(self._stretches) if stretch.data_phase.start <= step
        )
        n = stretch.data_phase.global_batch
        first = (step - stretch.data_phase.start) * n
        number, index = stretch.mixture.locate(np.arange(first, first + n, dtype=np.int64))
        found: list[Use | None] = [None] * n
        for j, name in enumerate(stretch.data_phase.counts):
            here = np.flatnonzero(number == j)
            if not here.size:
                continue
            places = self._dataset(name)[2].locate(index[here] + stretch.before.get(name, 0))
            by_shard = np.lexsort((places.row, places.shard))
            for i in by_shard.tolist():
                found[int(here[i])] = Use(
                    step,
                    int(places.epoch[i]),
                    self._sample(name, int(places.shard[i]), int(places.row[i])),
                )
        return [use for use in found if use is not None]

    def steps_of(self, sample: Sample) -> list[Use]:
        """Every use of a sample in the run, in order of steps."""
        _, _, order = self._dataset(sample.dataset)
        found: list[Use] = []
        for stretch in self._stretches:
            names = list(stretch.data_phase.counts)
            if sample.dataset not in names or stretch.end <= stretch.data_phase.start:
                continue
            j, n, first = (
                names.index(sample.dataset),
                stretch.data_phase.global_batch,
                stretch.before.get(sample.dataset, 0),
            )
            taken = stretch.mixture.count_taken((stretch.end - stretch.data_phase.start) * n)[j]
            epochs = np.arange(
                first // order.size, (first + taken - 1) // order.size + 1, dtype=np.int64
            )
            positions = order.find_positions(sample.shard, sample.row, epochs)
            inside = (positions >= first) & (positions < first + taken)
            steps = (
                stretch.data_phase.start
                + stretch.mixture.find_positions(j, positions[inside] - first) // n
            )
            found += [
                Use(step, epoch, sample)
                for step, epoch in zip(steps.tolist(), epochs[inside].tolist(), strict=True)
            ]
        return sorted(found, key=lambda use: (use.step, use.epoch))

    def find(self, key: str) -> Sample:
        """The sample that `key` names: `dataset/shard/key`, `shard/key` or `key`, or the beginning of one where only one sample has it.

        Raises:
            UsageError: no sample is called so, or several are.
        """
        exact: list[Sample] = []
        begun: list[Sample] = []
        for sample, whole in self._candidates(key):
            (exact if whole else begun).append(sample)
            if len(exact) > SHOWN:
                break
        found = exact or begun
        if len(found) == 1:
            return found[0]
        if not found:
            raise UsageError(
                f"no sample {key!r} in {', '.join(self.names)}",
                "an id is dataset/shard/key, as in `onellm samples RUN --step 0`.",
                "check the key; its beginning is enough where only one sample has it.",
            )
        shown = ", ".join(sample.name for sample in found[:SHOWN]) + (
            " ..." if len(found) > SHOWN else ""
        )
        raise UsageError(
            f"{key!r} may be {shown}", "steps are of one sample.", "give more of its id."
        )

    def _candidates(self, key: str) -> Iterator[tuple[Sample, bool]]:
        """Samples whose id, or id from the shard or from the key on, begins with `key`; and whether it is the whole of it."""
        shards = [
            (name, number, info)
            for name in self.names
            for number, info in enumerate(self._dataset(name)[1])
        ]
        named = [
            (*entry, start) for entry in shards for start in _starts(key, entry[0], entry[2].name)
        ]
        wanted = named or [
            (*entry, "") for entry in shards
        ]  # a bare key: every index is looked through
        with progress(
            len(wanted),
            "Looking through the shards",
            unit="shard",
            enabled=len(wanted) > MANY_SHARDS,
        ) as bar:
            for name, number, info, start in wanted:
                rest = key.removeprefix(start) if key.startswith(start) else ""
                keys = self._dataset(name)[0].index(info).keys()
                rows = [row for row, own in enumerate(keys) if own.startswith(rest)]
                rows.sort(key=lambda row, keys=keys: len(keys[row]))  # type: ignore[misc]
                yield from (
                    (Sample(name, number, row, info.name, keys[row]), keys[row] == rest)
                    for row in rows[: SHOWN + 1]
                )
                bar.advance(1)

    def _sample(self, name: str, shard: int, row: int) -> Sample:
        dataset, shards, _ = self._dataset(name)
        return Sample(name, shard, row, shards[shard].name, dataset.index(shards[shard]).key(row))

    def _dataset(self, name: str) -> tuple[Dataset, tuple[ShardInfo, ...], Order]:
        if name not in self._open:
            data_phase = next(s.data_phase for s in self._stretches if name in s.data_phase.counts)
            if name not in self._places:
                raise OneLLMError(
                    f"where dataset {name} lies is not recorded in this run",
                    "it left the mixture before runs recorded that (version 0.2), and config.yaml no longer names it.",
                    f'add it to ledger/datasets.json: {{"{name}": "/path/to/{name}"}}.',
                )
            dataset = open_dataset(self._places[name])
            shards = dataset.shards(data_phase.split)
            if compute_shards_fingerprint(shards) != data_phase.shards[name]:
                raise OneLLMError(
                    f"dataset {self._places[name]}: its shards are not those that the run reads",
                    "the same places hold other samples now, so the answer would be wrong.",
                    "restore the shards, or give their place in ledger/datasets.json.",
                )
            key = derive_key("order", data_phase.seed, name)
            self._open[name] = dataset, shards, Order([shard.samples for shard in shards], key)
        return self._open[name]


class Became(NamedTuple):
    """What became of a step."""

    state: str
    """`trained`, `skipped` (not applied), or `planned` (still to come)."""
    lost: int
    """How often it was done before by a start that was thrown back to an earlier checkpoint."""
    saved: bool
    """Whether a whole checkpoint has it: a kill now would not lose it."""


class RunRecord:
    """What a run directory says about the steps done so far; read once, also while the run goes on."""

    def __init__(self, run_dir: Path) -> None:
        ledger = run_dir / "ledger"
        self.skipped_samples: dict[str, str] = {}
        """Sample id (with its epoch) -> reason."""
        for path in sorted(ledger.glob("skipped_samples-rank*.jsonl")):
            self.skipped_samples |= {
                entry["sample_id"]: entry["reason"]
                for entry in _lines(path)
                if {"sample_id", "reason"} <= entry.keys()
            }
        self.lost = [
            (entry["first_step"], entry["lost_to"])
            for entry in _lines(ledger / "starts.jsonl")
            if entry.get("lost_to")
        ]
        """Ranges of steps [first, end) that a start did again."""
        self.progress = _number(ledger / "progress")
        """Steps done."""
        self.skipped = _skipped(run_dir / "metrics.jsonl")
        """Steps that were not applied."""
        saved = [
            path.parent.name for path in (run_dir / "checkpoints").glob("step-*/manifest.json")
        ]
        self.saved = max(
            (
                int(name.removeprefix("step-"))
                for name in saved
                if name.removeprefix("step-").isdigit()
            ),
            default=0,
        )
        """Steps that the newest checkpoint has."""

    def of(self, step: int) -> Became:
        """What became of a step."""
        state = (
            "planned" if step >= self.progress else "skipped" if step in self.skipped else "trained"
        )
        return Became(
            state,
            sum(first <= step < end for first, end in self.lost),
            step < min(self.saved, self.progress),
        )


def _starts(key: str, dataset: str, shard: str) -> list[str]:
    """How `key` names this shard, if it does: the beginning of its samples' ids, with or without the dataset."""
    if "/" not in key:
        return []
    return [
        start
        for start in (f"{dataset}/{shard}/", f"{shard}/")
        if key.startswith(start) or start.startswith(key)
    ][:1]


def _places(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Dataset -> where it lies: as recorded, else as the recipe's mixture names it (a folder is mostly called as its dataset)."""
    data = config["data"]
    root = str(data["root"])
    named = {}
    for entry in data["mixture"]:
        place = str(entry["path"])
        joined = place if "://" in place or place.startswith("/") else f"{root.rstrip('/')}/{place}"
        named[re.split(r"[/\\]", place.rstrip("/"))[-1]] = joined
    try:
        return named | json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return named


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that is being written or was cut short is left out."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict):
                found.append(entry)
    return found


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0


def _skipped(path: Path) -> frozenset[int]:
    """Steps of `metrics.jsonl` that were not applied; of 10^5 lines only those few are parsed."""
    if not path.is_file():
        return frozenset()
    with path.open(encoding="utf-8") as lines:
        return frozenset(
            int(json.loads(line)["step"])
            for line in lines
            if '"applied": false' in line and line.endswith("}\n")
        )
