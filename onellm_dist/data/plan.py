"""The plan: what every rank does in every step, as a pure function of (seed, mixture, shards, step).

`samples(step)` does not know the world; only the grouping into micro-steps does. Every rank computes the same plan, without
communication, and the whole state of the data is one integer: the step.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import DataSection
from onellm_dist.data.captions import chosen_captions
from onellm_dist.data.costs import CostModel, llm_tokens
from onellm_dist.data.micro_batch import MicroBatch, SampleRef, StepPlan
from onellm_dist.data.mixture import Mixture
from onellm_dist.data.order import Order, derive_key
from onellm_dist.data.packing import ItemSizes, TokenBudget, pack, too_large
from onellm_dist.data.phases import DataPhase, consumed, go_on, shards_fingerprint
from onellm_dist.data.retry import index_with_retries
from onellm_dist.data.text import TextEncoder
from onellm_dist.data.token_counts import (
    TokenCounts,
    build_token_counts,
    missing_token_counts,
    token_count_path,
)
from onellm_dist.modalities import Modality, get_modality
from onellm_dist.shards.format.dataset import Dataset, ShardInfo, open_dataset

Ints = NDArray[np.int64]
KEPT_STEPS = 16
"""Steps kept in memory: more than a loader reads ahead, as a rule."""


class _Batch(NamedTuple):
    """The samples of a global batch in stream order: six arrays [n], the fields of SampleRef."""

    dataset: Ints
    shard: Ints
    row: Ints
    epoch: Ints
    text_tokens: Ints
    supervised_tokens: Ints

    def refs(self, members: Ints | None = None) -> tuple[SampleRef, ...]:
        """The samples, or those at the indices `members`."""
        chosen = self if members is None else [column[members] for column in self]
        return tuple(
            map(SampleRef._make, zip(*(column.tolist() for column in chosen), strict=True))
        )


class _Ranks(Sequence[tuple[MicroBatch, ...]]):
    """[world][count] micro-steps, each rank's made when first asked for."""

    def __init__(
        self, step: int, global_valid_tokens: int, batch: _Batch, assigned: Sequence[Sequence[Ints]]
    ) -> None:
        self._step, self._global_valid_tokens, self._batch, self._assigned = (
            step,
            global_valid_tokens,
            batch,
            assigned,
        )
        self._made: dict[int, tuple[MicroBatch, ...]] = {}

    def __len__(self) -> int:
        return len(self._assigned)

    @overload
    def __getitem__(self, rank: int) -> tuple[MicroBatch, ...]: ...
    @overload
    def __getitem__(self, rank: slice) -> tuple[tuple[MicroBatch, ...], ...]: ...
    def __getitem__(
        self, rank: int | slice
    ) -> tuple[MicroBatch, ...] | tuple[tuple[MicroBatch, ...], ...]:
        if isinstance(rank, slice):
            return tuple(self[r] for r in range(len(self))[rank])
        rank = range(len(self))[rank]
        if rank not in self._made:
            packs = self._assigned[rank]
            self._made[rank] = tuple(
                MicroBatch(
                    self._step,
                    rank,
                    index,
                    len(packs),
                    self._batch.refs(members),
                    self._global_valid_tokens,
                )
                for index, members in enumerate(packs)
            )
        return self._made[rank]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


class Plan:
    """The stream of a run. Open it with `Plan.open`.

    Args:
        datasets: one a mixture entry, checked by `open_datasets`.
        config: the run's `data.*`.
        encoder: tokenizer, text format and length.
        seed: the run's seed.
        modalities: the model's modalities; every dataset's are among them.
        split: which split is read.
        costs: what samples are balanced on.
        sizes: patches a picture and prefix tokens of the encoder; CLIP ViT-L/14's where not given.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        config: DataSection,
        encoder: TextEncoder,
        seed: int,
        modalities: Sequence[str],
        *,
        split: str = "train",
        costs: CostModel | None = None,
        sizes: tuple[int, int] | None = None,
    ) -> None:
        self.datasets = tuple(datasets)
        self.config, self.encoder, self.seed, self.split = config, encoder, seed, split
        known = sorted(map(get_modality, modalities), key=lambda m: m.order)
        self.modalities: dict[str, Modality] = {
            m.name: m.under(patches=sizes[0], prefix=sizes[1]) if sizes else m for m in known
        }
        """The model's modalities by name, in the order of their spans."""
        self.shards: list[tuple[ShardInfo, ...]] = [dataset.shards(split) for dataset in datasets]
        """The shards of each dataset; SampleRef.shard counts in them."""
        self.spans: list[tuple[str, ...]] = [
            tuple(m for m in self.modalities if m in dataset.modalities) for dataset in datasets
        ]
        """The modalities of each dataset's samples, in the order of their spans."""
        self.mixture = Mixture([entry.weight for entry in config.mixture])
        self._orders = [
            Order([shard.samples for shard in shards], derive_key("order", seed, dataset.name))
            for dataset, shards in zip(datasets, self.shards, strict=True)
        ]
        self.data_phases: tuple[DataPhase, ...] = (self._data_phase(),)
        """The run's data_phases so far; the plan is that of the last one. See `follow`."""
        self._offsets = np.zeros(len(datasets), dtype=np.int64)
        self._token_counts = TokenCounts(datasets, encoder.fingerprint, split, seed)
        self._costs = costs or CostModel()
        kinds = [[self.modalities[name] for name in spans] for spans in self.spans]
        self._run_count = np.asarray([len(kind) for kind in kinds], dtype=np.int64)
        self._encoder_tokens = np.asarray(
            [sum(m.encoder_tokens for m in kind) for kind in kinds], dtype=np.int64
        )
        self._media_cost = np.asarray([self._costs.media(kind) for kind in kinds])
        self._batches: OrderedDict[int, _Batch] = OrderedDict()
        self._steps: OrderedDict[tuple[int, int], StepPlan] = OrderedDict()

    @classmethod
    def open(
        cls,
        config: DataSection,
        tokenizer: Any,
        seed: int,
        modalities: Sequence[str],
        *,
        split: str = "train",
        build_counts: bool = True,
        show: bool = True,
        sizes: tuple[int, int] | None = None,
    ) -> Plan:
        """Opens the datasets of a recipe, and measures text lengths that no one has measured.

        Args:
            tokenizer: the processor's (fast) tokenizer.
            modalities: names of the model's modalities.
            build_counts: false on ranks that wait for another one to measure: a missing sidecar is then an error.
            show: progress on stderr while lengths are measured.
            sizes: patches a picture and prefix tokens of the encoder; CLIP ViT-L/14's where not given.

        Raises:
            UsageError: anything wrong with the mixture, all of it at once; see also `build_token_counts` and `TextEncoder`.
        """
        datasets = open_datasets(config, modalities, split)
        encoder = TextEncoder(tokenizer, config.text_format, config.max_text_tokens)
        if build_counts:
            build_token_counts(datasets, encoder, split=split, show=show)
        else:
            _refuse_missing(datasets, encoder, split)
        return cls(datasets, config, encoder, seed, modalities, split=split, sizes=sizes)

    def follow(self, history: Sequence[DataPhase], step: int) -> bool:
        """Goes on from the data_phases of a checkpoint after `step` steps; returns whether a new data_phase begins.

        Raises:
            UsageError: see `data_phases.go_on`.
        """
        if not history:
            return False
        self.data_phases = go_on(history, self._data_phase(), step, allow_new=self.config.new_phase)
        before = consumed(self.data_phases[:-1], self.data_phases[-1].start)
        self._offsets = np.asarray(
            [before.get(dataset.name, 0) for dataset in self.datasets], dtype=np.int64
        )
        self._batches.clear()
        self._steps.clear()
        return self.data_phases != tuple(history[: len(self.data_phases)])

    def _data_phase(self) -> DataPhase:
        names = [dataset.name for dataset in self.datasets]
        return DataPhase(
            0,
            self.seed,
            self.split,
            self.config.global_batch,
            self.encoder.fingerprint,
            dict(zip(names, self.mixture.counts, strict=True)),
            dict(zip(names, map(shards_fingerprint, self.shards), strict=True)),
        )

    def samples(self, step: int) -> tuple[SampleRef, ...]:
        """The global batch of a step (the first is 0) in stream order; the same for every world."""
        return self._batch(step).refs()

    def step(self, step: int, world: int) -> StepPlan:
        """The global batch, packed and assigned to `world` ranks.

        Raises:
            UsageError: a sample is larger than a micro-batch may be.
        """
        known = self._steps.get((step, world))
        if known is None:
            known = self._steps[step, world] = self._assign(step, world)
            _forget(self._steps)
        return known

    def digest(self, step: int) -> str:
        """`sample_digest`: hex SHA-256 of the step's sample ids, sorted as bytes, each followed by a newline."""
        ids = sorted(name.encode("utf-8") for name in self.sample_ids(self.samples(step)))
        return hashlib.sha256(b"".join(name + b"\n" for name in ids)).hexdigest()

    def sample_id(self, ref: SampleRef) -> str:
        """`dataset/shard-name/key@epoch`."""
        dataset, shard = self.datasets[ref.dataset], self.shards[ref.dataset][ref.shard]
        return f"{dataset.name}/{shard.name}/{index_with_retries(dataset, shard).key(ref.row)}@{ref.epoch}"

    def sample_ids(self, refs: Sequence[SampleRef]) -> list[str]:
        """`sample_id` of each, opening every shard's index once."""
        ids = [""] * len(refs)
        for i in sorted(range(len(refs)), key=refs.__getitem__):
            ids[i] = self.sample_id(refs[i])
        return ids

    def caption_of(self, ref: SampleRef, count: int) -> int:
        """Which of its `count` captions a sample is read with."""
        one = np.ones(1, dtype=np.int64)
        dataset, shard = self.datasets[ref.dataset], self.shards[ref.dataset][ref.shard]
        return int(
            chosen_captions(
                self.seed, dataset.name, shard.name, one * ref.row, one * ref.epoch, one * count
            )[0]
        )

    def fingerprint(self) -> str:
        """Hex SHA-256 of everything the stream depends on: two plans of one fingerprint give the same samples at every step."""
        config = self.config
        text = [
            f"{self.seed} {config.global_batch} {self.split} {config.text_format} {config.max_text_tokens} {self.mixture.counts}"
        ]
        for dataset, shards in zip(self.datasets, self.shards, strict=True):
            text.append(f"{dataset.name} {dataset.modalities}")
            text += [f"{shard.name} {shard.samples} {shard.sha256}" for shard in shards]
        if len(self.data_phases) > 1:
            text.append(f"{self.data_phases[-1].start} {self._offsets.tolist()}")
        return hashlib.sha256("\n".join(text).encode("utf-8")).hexdigest()

    def _batch(self, step: int) -> _Batch:
        known = self._batches.get(step)
        if known is None:
            known = self._batches[step] = self._locate(step)
            _forget(self._batches)
        return known

    def _locate(self, step: int) -> _Batch:
        first = self.data_phases[-1].start
        if step < first:
            raise ValueError(f"step {step} < {first}, where the data_phase of this plan begins")
        n = self.config.global_batch
        dataset, index = self.mixture.locate(
            np.arange((step - first) * n, (step - first + 1) * n, dtype=np.int64)
        )
        index += self._offsets[dataset]
        epoch, shard, row = (np.empty(n, dtype=np.int64) for _ in range(3))
        for number in np.unique(dataset).tolist():
            here = np.flatnonzero(dataset == number)
            epoch[here], shard[here], row[here] = self._orders[number].locate(index[here])
        pairs = np.empty((n, 2), dtype=np.int64)
        by_place = np.lexsort((shard, dataset))
        starts = np.flatnonzero(
            np.diff(dataset[by_place], prepend=-1) | np.diff(shard[by_place], prepend=-1)
        )
        for here in np.split(by_place, starts[1:]):
            pairs[here] = self._token_counts.at(
                int(dataset[here[0]]), int(shard[here[0]]), row[here], epoch[here]
            )
        return _Batch(dataset, shard, row, epoch, pairs[:, 0], pairs[:, 1])

    def _assign(self, step: int, world: int) -> StepPlan:
        batch = self._batch(step)
        llm = llm_tokens(batch.text_tokens, self._run_count[batch.dataset])
        loads = ItemSizes(
            llm,
            self._encoder_tokens[batch.dataset],
            self._costs.samples(self._media_cost[batch.dataset], llm),
        )
        budget = TokenBudget(self.config.pack_llm_tokens, self.config.pack_encoder_tokens)
        over = too_large(loads, budget)
        if over is not None:
            raise self._too_large(
                batch.refs(np.asarray([over]))[0], int(loads.llm[over]), int(loads.encoder[over])
            )
        global_valid_tokens = max(1, int(batch.supervised_tokens.sum()))
        assigned = pack(loads, budget, world)
        costs = [int(loads.cost[members].sum()) for rank in assigned for members in rank]
        return StepPlan(
            step,
            global_valid_tokens,
            _Ranks(step, global_valid_tokens, batch, assigned),
            max(costs) * len(costs) / sum(costs),
        )

    def _too_large(self, ref: SampleRef, llm: int, encoder: int) -> UsageError:
        key, size, cap = (
            ("data.pack_llm_tokens", llm, self.config.pack_llm_tokens)
            if llm > self.config.pack_llm_tokens
            else ("data.pack_encoder_tokens", encoder, self.config.pack_encoder_tokens)
        )
        return UsageError(
            f"sample {self.sample_id(ref)} ({', '.join(self.spans[ref.dataset]) or 'text'}, {ref.text_tokens} text tokens) needs {size} "
            f"tokens; {key} is {cap}",
            "a micro-batch holds whole samples, so this one fits in none.",
            f"raise {key} to {size} or more"
            + (", or lower data.max_text_tokens." if llm > self.config.pack_llm_tokens else "."),
        )


def open_datasets(
    config: DataSection, modalities: Sequence[str], split: str = "train"
) -> list[Dataset]:
    """The datasets of a mixture, checked.

    Raises:
        UsageError: lists every problem: a missing, empty or repeated dataset, one without this split, a modality that the
            model does not have, a weight that is no number.
    """
    problems: list[UsageError] = []
    datasets: list[Dataset] = []
    for entry in config.mixture:
        try:
            dataset = open_dataset(config.place(entry))
            _check(dataset, entry.weight, modalities, split, datasets)
            datasets.append(dataset)
        except UsageError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UsageError(
            f"{len(problems)} problems in data.mixture\n"
            + "\n".join(f"  - {p.what} {p.do}" for p in problems),
            "nothing was started.",
            "mend the recipe's data.root and data.mixture, or the datasets.",
        )
    return datasets


def _check(
    dataset: Dataset,
    weight: float,
    modalities: Sequence[str],
    split: str,
    before: Sequence[Dataset],
) -> None:
    if not math.isfinite(weight):
        raise UsageError(
            f"dataset {dataset.place}: weight {weight} is no number",
            "shares cannot be computed.",
            "give a number above 0.",
        )
    unknown = [name for name in dataset.modalities if name not in modalities]
    if unknown:
        raise UsageError(
            f"dataset {dataset.place} has modality {', '.join(unknown)}; the model has {', '.join(modalities) or 'none'}",
            "the model has no tokenizer for it.",
            "take the dataset out of data.mixture, or use a model with this modality.",
        )
    if not sum(shard.samples for shard in dataset.shards(split)):
        raise UsageError(
            f"dataset {dataset.place}: its split {split!r} is empty",
            "nothing can be read from it.",
            "build it again, or take it out.",
        )
    twin = next((other for other in before if other.name == dataset.name), None)
    if twin is not None:
        raise UsageError(
            f"datasets {twin.place} and {dataset.place} have the same name, {dataset.name!r}",
            "sample ids, orders and digests go by it, so both would give the same.",
            "name a dataset once, with the sum of the weights; or build one of them under another name.",
        )


def _refuse_missing(datasets: Sequence[Dataset], encoder: TextEncoder, split: str) -> None:
    missing = missing_token_counts(datasets, encoder.fingerprint, split)
    if missing:
        dataset, shard = missing[0]
        raise UsageError(
            f"{token_count_path(dataset, shard, encoder.fingerprint)}: no such file ({len(missing)} shards have no text lengths)",
            "plans are made from them.",
            "let rank 0 measure them first, to a disk that all ranks share (ONELLM_CACHE, where the dataset is read-only).",
        )


def _forget(kept: OrderedDict[Any, Any]) -> None:
    while len(kept) > KEPT_STEPS:
        kept.popitem(last=False)
