"""What a step consists of: its samples as a table, the micro-batches of every rank, and totals.

Plan, reader, model and watchdog share these values. None of them depends on where it was computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class SampleRef(NamedTuple):
    """One sample of the stream, by position; names are looked up in the dataset's manifest."""

    dataset: int
    """Index of the dataset in the mixture."""
    shard: int
    """Index of the shard in the dataset's manifest."""
    row: int
    """Row of the sample in the shard's index."""
    epoch: int
    """How many times the dataset had been read completely before this sample."""
    text_tokens: int
    """Tokens of the sample's text, BOS included, from the token-count cache."""
    supervised_tokens: int
    """Text tokens that are training targets."""


class SampleTable(NamedTuple):
    """The samples of a global batch in stream order: the fields of SampleRef as six arrays [n]."""

    dataset: Ints
    shard: Ints
    row: Ints
    epoch: Ints
    text_tokens: Ints
    supervised_tokens: Ints

    def refs(self, members: Ints | None = None) -> tuple[SampleRef, ...]:
        """Return the samples at the indices `members`; default: all of them."""
        return tuple(map(SampleRef._make, self.rows(members)))

    def rows(self, members: Ints | None = None) -> list[tuple[int, ...]]:
        """Return the samples at the indices `members` as plain tuples; default: all of them."""
        columns = self if members is None else [column[members] for column in self]
        return list(zip(*(column.tolist() for column in columns), strict=True))


def group_by_shard(dataset: Ints, shard: Ints) -> list[Ints]:
    """Return the indices of the samples of each shard, shard by shard.

    Args:
        dataset: [n] dataset of each sample.
        shard: [n] shard of each sample.
    """
    order = np.lexsort((shard, dataset))
    starts = np.flatnonzero(np.diff(dataset[order], prepend=-1) | np.diff(shard[order], prepend=-1))
    return np.split(order, starts[1:])


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass of one rank, the same for every rank that computes the plan."""

    step: int
    """Index of the optimizer step; the first step is 0."""
    rank: int
    """The rank that runs this micro-batch."""
    index: int
    """Position within the step: 0 .. count - 1."""
    count: int
    """Micro-batches of this step; the same for every rank."""
    samples: tuple[SampleRef, ...]
    """Samples in pack order; an empty micro-batch runs one token of zero weight instead."""
    global_valid_tokens: int
    """Supervised tokens of the whole global batch by the plan, skipped samples included."""

    @property
    def is_empty(self) -> bool:
        """Whether the rank received no samples for this micro-batch."""
        return not self.samples

    @property
    def last(self) -> bool:
        """Whether the optimizer step follows this micro-batch."""
        return self.index == self.count - 1


class _RankMicroBatches(Sequence[tuple[MicroBatch, ...]]):
    """[world_size][count] micro-batches; a rank's are built when they are first asked for."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        self._built: dict[int, tuple[MicroBatch, ...]] = {}

    def __len__(self) -> int:
        return len(self._plan.assigned)

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
        if rank not in self._built:
            self._built[rank] = self._build(rank)
        return self._built[rank]

    def _build(self, rank: int) -> tuple[MicroBatch, ...]:
        plan = self._plan
        packs = plan.assigned[rank]
        return tuple(
            MicroBatch(
                step=plan.step,
                rank=rank,
                index=index,
                count=len(packs),
                samples=plan.samples.refs(members),
                global_valid_tokens=plan.global_valid_tokens,
            )
            for index, members in enumerate(packs)
        )


@dataclass(frozen=True)
class BatchTotals:
    """What all ranks process together in one step, by the plan."""

    samples: int
    """Samples of the global batch."""
    llm_tokens: int
    """LLM positions of all samples: text tokens and media spans."""
    encoder_tokens: int
    """Packed encoder tokens of all samples."""
    supervised_tokens: int
    """Text tokens that are training targets."""
    empty_micro_batches: int
    """Micro-batches without a sample; each runs one token of zero weight."""
    samples_by_dataset: tuple[int, ...]
    """Samples of each dataset, in the order of the mixture."""
    samples_by_combination: Mapping[tuple[str, ...], int]
    """Modality combination (in span order; empty for text only) to number of samples."""
    varied_spans: Mapping[str, int] = field(default_factory=dict)
    """Modality to spans of the samples of varied datasets (see `CorpusMedia`)."""
    pairs: int | None = None
    """Preference pairs that can be read, by the token counts; None: samples are not pairs."""


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The global batch of one step, assigned to ranks."""

    step: int
    """Index of the optimizer step; the first step is 0."""
    samples: SampleTable
    """The global batch, independent of the number of ranks."""
    assigned: Sequence[Sequence[Ints]]
    """[world_size][count] indices into `samples`, one array a micro-batch."""
    totals: BatchTotals
    """Sums over all ranks; computed from arrays, without building a SampleRef."""
    balance: float
    """Predicted cost of the costliest micro-batch over the mean of all micro-batches."""

    @property
    def global_valid_tokens(self) -> int:
        """Supervised tokens of the global batch, at least 1."""
        return max(1, self.totals.supervised_tokens)

    @property
    def loss_count(self) -> int:
        """What the summed loss is divided by: supervised tokens, or pairs; at least 1."""
        pairs = self.totals.pairs
        return self.global_valid_tokens if pairs is None else max(1, pairs)

    @cached_property
    def ranks(self) -> Sequence[tuple[MicroBatch, ...]]:
        """[world_size][count] micro-batches; those of a rank are built when first asked for."""
        return _RankMicroBatches(self)

    def digest(self) -> str:
        """Hash everything the ranks will do in this step; all ranks must compute the same value."""
        digest = hashlib.sha256()
        for rank, packs in enumerate(self.assigned):
            for index, members in enumerate(packs):
                rows = self.samples.rows(members)
                content = (self.step, rank, index, len(packs), self.global_valid_tokens, rows)
                digest.update(repr(content).encode())
        return digest.hexdigest()
