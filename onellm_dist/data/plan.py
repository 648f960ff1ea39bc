"""The plan: what every rank does in a step, as a pure function of (seed, mixture, shards, step).

The samples of a step do not depend on the number of ranks; only their grouping into micro-batches
does. Every rank computes the same plan without communication, and the whole state of the data is
one integer: the step.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import DataSection
from onellm_dist.data.corpus import Corpus
from onellm_dist.data.costs import CostModel, count_llm_tokens
from onellm_dist.data.micro_batch import (
    BatchTotals,
    SampleRef,
    SampleTable,
    StepPlan,
    group_by_shard,
)
from onellm_dist.data.mixture import Mixture, round_weights
from onellm_dist.data.order import Order, derive_key
from onellm_dist.data.packing import ItemSizes, TokenBudget, find_too_large, pack
from onellm_dist.data.phases import (
    DataPhase,
    compute_shards_fingerprint,
    continue_phases,
    count_consumed,
)
from onellm_dist.data.token_budget import read_budget, set_budget

Ints = NDArray[np.int64]
KEPT_STEPS = 16
"""Fewest recent steps that stay in memory; more where the loader reads further ahead."""


class Plan:
    """The stream of a run: which samples each rank processes in each step.

    Args:
        corpus: what is read.
        costs: what micro-batches are balanced on; default: the sizes of the paper's model.
    """

    def __init__(self, corpus: Corpus, *, costs: CostModel | None = None) -> None:
        self.corpus = corpus
        self.config: DataSection = corpus.config
        self.mixture = Mixture([entry.weight for entry in self.config.mixture])
        self._orders = [
            Order(
                [shard.samples for shard in shards],
                derive_key("order", corpus.seed, dataset.name),
            )
            for dataset, shards in zip(corpus.datasets, corpus.shards, strict=True)
        ]
        self.data_phases: tuple[DataPhase, ...] = (self._data_phase(),)
        """The data phases of the run so far; the plan is that of the last one (see `follow`)."""
        self._offsets = np.zeros(len(corpus.datasets), dtype=np.int64)
        self._costs = costs or CostModel()
        media = [[corpus.modalities[name] for name in spans] for spans in corpus.spans]
        self._span_count = np.asarray([len(spans) for spans in media], dtype=np.int64)
        self._encoder_tokens = np.asarray(
            [sum(m.encoder_tokens for m in spans) for spans in media], dtype=np.int64
        )
        self._media_cost = np.asarray([self._costs.media(spans) for spans in media])
        self._encoder_of_span = [m.encoder_tokens for m in corpus.modalities.values()]
        self._cost_of_span = [self._costs.media([m]) for m in corpus.modalities.values()]
        self._kept_steps = max(KEPT_STEPS, self.config.workers * (self.config.prefetch + 1) + 2)
        self._tables: OrderedDict[int, SampleTable] = OrderedDict()
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
        """Open the corpus of a recipe and plan it; `Corpus.open` has the arguments and errors."""
        corpus = Corpus.open(
            config,
            tokenizer,
            seed,
            modalities,
            split=split,
            build_counts=build_counts,
            show=show,
            sizes=sizes,
        )
        return cls(corpus)

    def set_budget(self, budget: TokenBudget) -> None:
        """Pack micro-batches within other token budgets; the samples of a step stay the same."""
        self.config = self.corpus.config = set_budget(self.config, budget)
        self._steps.clear()

    def find_fullest(self, step: int, world_size: int) -> TokenBudget:
        """Return the most LLM positions and the most encoder tokens of a step's micro-batches."""
        planned = self.step(step, world_size)
        sizes, _ = self._measure(planned.samples)
        packs = [members for rank in planned.assigned for members in rank]
        return TokenBudget(
            max(int(sizes.llm[members].sum()) for members in packs),
            max(int(sizes.encoder[members].sum()) for members in packs),
        )

    def count_mean_text(self, step: int) -> int:
        """Return the mean text tokens of the samples of a step."""
        return round(float(self._table(step).text_tokens.mean()))

    def follow(self, history: Sequence[DataPhase], step: int) -> bool:
        """Continue the data phases of a checkpoint that was saved after `step` steps.

        Returns:
            Whether a new data phase begins.

        Raises:
            UsageError: see `phases.continue_phases`.
        """
        if not history:
            return False
        self._keep_rounded_weights(history, step)
        self.data_phases = continue_phases(
            history, self._data_phase(), step, allow_new=self.config.new_phase
        )
        before = count_consumed(self.data_phases[:-1], self.data_phases[-1].start)
        self._offsets = np.asarray(
            [before.get(dataset.name, 0) for dataset in self.corpus.datasets], dtype=np.int64
        )
        self._tables.clear()
        self._steps.clear()
        return self.data_phases != tuple(history[: len(self.data_phases)])

    def _keep_rounded_weights(self, history: Sequence[DataPhase], step: int) -> None:
        """Use the rounded integer weights of a run that began when integers were rounded."""
        rounded = round_weights([entry.weight for entry in self.config.mixture])
        names = [dataset.name for dataset in self.corpus.datasets]
        last = next(phase for phase in reversed(history) if phase.start <= step)
        if list(last.counts.items()) == list(zip(names, rounded, strict=True)):
            self.mixture = Mixture.from_counts(rounded)

    def _data_phase(self) -> DataPhase:
        corpus = self.corpus
        names = [dataset.name for dataset in corpus.datasets]
        return DataPhase(
            0,
            corpus.seed,
            corpus.split,
            self.config.global_batch,
            corpus.text_encoder.fingerprint,
            dict(zip(names, self.mixture.counts, strict=True)),
            dict(zip(names, map(compute_shards_fingerprint, corpus.shards), strict=True)),
        )

    def samples(self, step: int) -> tuple[SampleRef, ...]:
        """Return the global batch of a step in stream order; the same for any number of ranks."""
        return self._table(step).refs()

    def count_samples(self, step: int) -> tuple[int, ...]:
        """Return the samples of a step by dataset; no token count is needed."""
        dataset, _ = self._locate_in_mixture(step)
        return tuple(np.bincount(dataset, minlength=len(self.corpus.datasets)).tolist())

    def step(self, step: int, world_size: int) -> StepPlan:
        """Return the global batch of a step, packed and assigned to `world_size` ranks.

        Recent steps are kept, so asking again is cheap.

        Raises:
            UsageError: a sample is larger than a micro-batch may be.
        """
        known = self._steps.get((step, world_size))
        if known is None:
            known = self._steps[step, world_size] = self._assign(step, world_size)
            self._drop_oldest(self._steps)
        return known

    def digest(self, step: int) -> str:
        """Return the `sample_digest` of a step.

        It is the hex SHA-256 of the step's sample ids, sorted as bytes, each with a newline.
        """
        ids = sorted(name.encode("utf-8") for name in self.corpus.table_ids(self._table(step)))
        return hashlib.sha256(b"".join(name + b"\n" for name in ids)).hexdigest()

    def fingerprint(self) -> str:
        """Return the hex SHA-256 of everything the stream depends on.

        Two plans with the same fingerprint give the same samples at every step.
        """
        config, corpus = self.config, self.corpus
        text = [
            f"{corpus.seed} {config.global_batch} {corpus.split} {config.text_format} "
            f"{config.max_text_tokens} {self.mixture.counts}"
        ]
        for dataset, shards in zip(corpus.datasets, corpus.shards, strict=True):
            text.append(f"{dataset.name} {dataset.modalities}")
            text += [f"{shard.name} {shard.samples} {shard.sha256}" for shard in shards]
        if config.preference_pairs:
            text.append("preference pairs")
        if config.spans:
            text.append(f"spans {sorted(config.spans.items())}")
        if len(self.data_phases) > 1:
            text.append(f"{self.data_phases[-1].start} {self._offsets.tolist()}")
        return hashlib.sha256("\n".join(text).encode("utf-8")).hexdigest()

    def _table(self, step: int) -> SampleTable:
        known = self._tables.get(step)
        if known is None:
            known = self._tables[step] = self._locate(step)
            self._drop_oldest(self._tables)
        return known

    def _locate_in_mixture(self, step: int) -> tuple[Ints, Ints]:
        first = self.data_phases[-1].start
        if step < first:
            raise ValueError(
                f"step {step} lies before {first}, where this plan's data phase begins"
            )
        n = self.config.global_batch
        return self.mixture.locate(
            np.arange((step - first) * n, (step - first + 1) * n, dtype=np.int64)
        )

    def _locate(self, step: int) -> SampleTable:
        n = self.config.global_batch
        dataset, index = self._locate_in_mixture(step)
        index += self._offsets[dataset]
        epoch, shard, row = (np.empty(n, dtype=np.int64) for _ in range(3))
        for number in np.unique(dataset).tolist():
            here = np.flatnonzero(dataset == number)
            epoch[here], shard[here], row[here] = self._orders[number].locate(index[here])
        counts = np.empty((n, 2), dtype=np.int64)
        for here in group_by_shard(dataset, shard):
            counts[here] = self.corpus.token_counts.get(
                int(dataset[here[0]]), int(shard[here[0]]), row[here], epoch[here]
            )
        return SampleTable(dataset, shard, row, epoch, counts[:, 0], counts[:, 1])

    def _assign(self, step: int, world_size: int) -> StepPlan:
        table = self._table(step)
        sizes, spans = self._measure(table)
        budget = read_budget(self.config)
        over = find_too_large(sizes, budget)
        if over is not None:
            raise self._too_large(
                table.refs(np.asarray([over]))[0], int(sizes.llm[over]), int(sizes.encoder[over])
            )
        assigned = pack(sizes, budget, world_size)
        packs = [members for rank in assigned for members in rank]
        costs = [int(sizes.cost[members].sum()) for members in packs]
        return StepPlan(
            step,
            table,
            assigned,
            self._totals(table, sizes, spans, sum(not members.size for members in packs)),
            max(costs) * len(costs) / sum(costs),
        )

    def _measure(self, table: SampleTable) -> tuple[ItemSizes, Ints]:
        """Return the sizes of samples, and [k, M] the spans of those of varied datasets."""
        count, encoder = self._span_count[table.dataset], self._encoder_tokens[table.dataset]
        cost, media = self._media_cost[table.dataset], self.corpus.media
        varied = np.flatnonzero(media.varied[table.dataset])
        spans = np.zeros((0, len(media.names)), dtype=np.int64)
        if varied.size:
            spans = media.count(table, varied)
            count[varied], encoder[varied], cost[varied] = spans.sum(1), 0, 0.0
            for i, (tokens, operations) in enumerate(
                zip(self._encoder_of_span, self._cost_of_span, strict=True)
            ):
                encoder[varied] += tokens * spans[:, i]
                cost[varied] += operations * spans[:, i]
        answers = self.config.answers
        llm = count_llm_tokens(table.text_tokens, answers * count)
        return ItemSizes(llm, encoder, self._costs.samples(cost, llm, answers=answers)), spans

    def _totals(
        self, table: SampleTable, sizes: ItemSizes, varied_spans: Ints, empty: int
    ) -> BatchTotals:
        corpus, names = self.corpus, self.corpus.media.names
        by_dataset = np.bincount(table.dataset, minlength=len(corpus.datasets)).tolist()
        by_combination: dict[tuple[str, ...], int] = {}
        varied = corpus.media.varied.tolist()
        for spans, count, is_varied in zip(corpus.spans, by_dataset, varied, strict=True):
            if not is_varied:
                by_combination[spans] = by_combination.get(spans, 0) + count
        for row, number in Counter(map(tuple, (varied_spans > 0).tolist())).items():
            own = tuple(name for name, has in zip(names, row, strict=True) if has)
            by_combination[own] = by_combination.get(own, 0) + number
        return BatchTotals(
            samples=len(table.dataset),
            llm_tokens=int(sizes.llm.sum()),
            encoder_tokens=int(sizes.encoder.sum()),
            supervised_tokens=int(table.supervised_tokens.sum()),
            empty_micro_batches=empty,
            samples_by_dataset=tuple(by_dataset),
            samples_by_combination=by_combination,
            varied_spans=dict(zip(names, varied_spans.sum(0).tolist(), strict=True)),
            pairs=int((table.supervised_tokens > 0).sum())
            if self.config.preference_pairs
            else None,
        )

    def _too_large(self, ref: SampleRef, llm: int, encoder: int) -> UsageError:
        budget = read_budget(self.config)
        over_llm = llm > budget.llm
        key, size, limit = (
            ("data.pack_llm_tokens", llm, budget.llm)
            if over_llm
            else ("data.pack_encoder_tokens", encoder, budget.encoder)
        )
        media = self.corpus.describe_media(ref)
        return UsageError(
            f"sample {self.corpus.sample_id(ref)} ({media}, "
            f"{format_count(ref.text_tokens, 'text token')}) needs "
            f"{format_count(size, 'token')}; {key} is {limit}",
            "a micro-batch holds whole samples, so this one does not fit in any.",
            f"raise {key} to {size} or more"
            + (", or lower data.max_text_tokens." if over_llm else "."),
        )

    def _drop_oldest(self, kept: OrderedDict[Any, Any]) -> None:
        while len(kept) > self._kept_steps:
            kept.popitem(last=False)
