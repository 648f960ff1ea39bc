"""MicroBatch -> PackedBatch: reads, decodes and transforms the samples of one micro-step.

A sample that cannot be read or decoded keeps its slot as a skipped_sample: zero values, as many text tokens as planned, weight
0. No other sample is ever taken in its place.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.data.cache import ChunkCache
from onellm_dist.data.corpus import Corpus
from onellm_dist.data.micro_batch import MicroBatch, SampleRef
from onellm_dist.data.order import derive_key
from onellm_dist.data.readahead import ReadAhead, Span
from onellm_dist.data.retry import index_with_retries, span_with_retries
from onellm_dist.data.text_parts import read_meta
from onellm_dist.data.token_counts import UNREADABLE, token_count_path
from onellm_dist.modalities import Modality
from onellm_dist.modalities.base import Part
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.shards.format.index import SampleSpan, extract_parts, get_parts_span


@dataclass(frozen=True)
class _Sample:
    ids: Sequence[int]
    labels: Sequence[int]
    values: Mapping[str, torch.Tensor]
    skipped_sample: str | None = None


class _Place(NamedTuple):
    """Where a sample's bytes are."""

    slots: dict[str, dict[str, str]]
    """Modality -> slot -> extension."""
    parts: SampleSpan
    span: Span


class Reader:
    """Reads micro-steps of a plan. What it returns depends on the MicroBatch alone (and on the disk working).

    Args:
        plan: the run's plan.
        skipped_samples: sample id to reason, of samples that an earlier start of the run could not read (its ledger): they
            are not tried again, so that a resumed run sees what the first one saw.
    """

    def __init__(self, corpus: Corpus, skipped_samples: Mapping[str, str] | None = None) -> None:
        self._corpus = corpus
        self._known = dict(skipped_samples or {})
        config = corpus.config
        self._cache = (
            ChunkCache(config.cache_dir, int(config.cache_gb * 1e9)) if config.cache_dir else None
        )
        self._ahead: tuple[int, ReadAhead] | None = None
        self._places: dict[SampleRef, _Place] = {}

    def read(self, micro: MicroBatch, ahead: MicroBatch | None = None) -> PackedBatch:
        """The micro-batch; see PackedBatch for its shapes. One BOS of zero weight where nothing was assigned.

        Args:
            ahead: the one that this process will be asked for next; its bytes are fetched meanwhile.

        Raises:
            OneLLMError: a text has another length than its sidecar says; an index is damaged.
        """
        if micro.is_empty:
            return self._pack(
                [_Sample([self._corpus.text_encoder.bos], [IGNORE], {})], [()], [""], is_empty=True
            )
        ids = self._corpus.sample_ids(micro.samples)
        known, self._places = self._places, {}
        now, later = (
            self._spans(micro.samples, known),
            self._spans(ahead.samples if ahead else (), known),
        )
        self._read_ahead.ask(now, later)
        samples = [self._sample(ref, name) for ref, name in zip(micro.samples, ids, strict=True)]
        return self._pack(
            samples, [self._corpus.spans[ref.dataset] for ref in micro.samples], ids, is_empty=False
        )

    @property
    def _read_ahead(self) -> ReadAhead:
        if self._ahead is None or self._ahead[0] != os.getpid():
            self._ahead = (
                os.getpid(),
                ReadAhead(self._cache, self._corpus.config.read_ahead_mb << 20),
            )
        return self._ahead[1]

    def _spans(self, refs: Sequence[SampleRef], known: Mapping[SampleRef, _Place]) -> list[Span]:
        """Where the samples lie, as far as it can be told (whoever reads the others says what is wrong with them)."""
        spans = []
        for ref in refs:
            with contextlib.suppress(OneLLMError):
                place = self._places[ref] = known.get(ref) or self._place(ref)
                spans.append(place.span)
        return spans

    def _place(self, ref: SampleRef) -> _Place:
        corpus = self._corpus
        dataset, shard = corpus.datasets[ref.dataset], corpus.shards[ref.dataset][ref.shard]
        there = dataset.index(shard).parts(ref.row)
        slots = {name: corpus.modalities[name].match(there) for name in corpus.spans[ref.dataset]}
        wanted = {
            *TEXT_EXTENSIONS,
            *(extension for found in slots.values() for extension in found.values()),
        }
        parts = get_parts_span(there, wanted)
        return _Place(slots, parts, Span(dataset, shard, parts.start, parts.end))

    def _parts(self, ref: SampleRef, place: _Place) -> dict[str, Part]:
        """A sample's parts: from what was fetched ahead if that is sound, else from the tar."""
        span = place.span
        data = self._read_ahead.take(span)
        if data is not None:
            try:
                return extract_parts(span.dataset, span.shard, ref.row, place.parts, data)
            except SampleError:
                self._read_ahead.distrust(span)
        return span_with_retries(span.dataset, span.shard, ref.row, place.parts)

    def _sample(self, ref: SampleRef, sample_id: str) -> _Sample:
        reason = self._known.get(sample_id)
        if reason is not None:
            return self._skipped_sample(ref, reason)
        try:
            return self._read(ref, sample_id)
        except SampleError as error:
            return self._skipped_sample(ref, f"{sample_id}: {error.what}")

    def _read(self, ref: SampleRef, sample_id: str) -> _Sample:
        corpus = self._corpus
        kinds = [corpus.modalities[name] for name in corpus.spans[ref.dataset]]
        place = self._places.get(ref)
        if place is None:
            index_with_retries(corpus.datasets[ref.dataset], corpus.shards[ref.dataset][ref.shard])
            place = self._place(ref)
        parts = self._parts(ref, place)
        ids, labels = corpus.text_encoder.encode(parts, partial(corpus.caption_index, ref))
        self._check_length(ref, sample_id, ids, labels)
        meta = read_meta(parts)
        values = {}
        for kind in kinds:
            slots = {slot: parts[extension] for slot, extension in place.slots[kind.name].items()}
            with _decoding(kind, sample_id):
                raw = kind.decode(slots, meta)
                values[kind.name] = kind.transform(
                    raw, train=corpus.config.augment, rng=self._rng(kind, sample_id)
                )
            _check_value(kind, values[kind.name], sample_id)
        return _Sample(ids, labels, values)

    def _rng(self, kind: Modality, sample_id: str) -> np.random.Generator:
        """Seeded by run, sample, epoch and modality: never by a worker, a rank or what was read before."""
        return np.random.Generator(
            np.random.PCG64(derive_key("augment", self._corpus.seed, sample_id, kind.name))
        )

    def _check_length(
        self, ref: SampleRef, sample_id: str, ids: Sequence[int], labels: Sequence[int]
    ) -> None:
        planned = (ref.text_tokens, ref.supervised_tokens)
        if planned == UNREADABLE:
            raise SampleError(
                "its text could not be read when text lengths were measured",
                "it was planned as a skipped_sample.",
            )
        now = (len(ids), sum(label >= 0 for label in labels))
        if now != planned:
            corpus = self._corpus
            sidecar = token_count_path(
                corpus.datasets[ref.dataset],
                corpus.shards[ref.dataset][ref.shard],
                corpus.text_encoder.fingerprint,
            )
            raise OneLLMError(
                f"stale sidecar {sidecar}: sample {sample_id} has {now[0]} text tokens ({now[1]} supervised), "
                f"the sidecar says {planned[0]} ({planned[1]})",
                "the plan of this run was made from it, and the loss is divided by its counts.",
                "remove the file and start again; it is measured anew.",
            )

    def _skipped_sample(self, ref: SampleRef, reason: str) -> _Sample:
        spans = self._corpus.spans[ref.dataset]
        zeros = {name: torch.zeros(self._corpus.modalities[name].value_shape) for name in spans}
        return _Sample(
            [self._corpus.text_encoder.bos] * ref.text_tokens,
            [IGNORE] * ref.text_tokens,
            zeros,
            reason,
        )

    def _pack(
        self,
        samples: Sequence[_Sample],
        spans: Sequence[tuple[str, ...]],
        sample_ids: Sequence[str],
        *,
        is_empty: bool,
    ) -> PackedBatch:
        values = {}
        for name, kind in self._corpus.modalities.items():
            found = [sample.values[name] for sample in samples if name in sample.values]
            values[name] = torch.stack(found) if found else torch.zeros((0, *kind.value_shape))
        labels = torch.tensor(
            [label for sample in samples for label in sample.labels], dtype=torch.int64
        )
        return PackedBatch(
            input_ids=torch.tensor(
                [token for sample in samples for token in sample.ids], dtype=torch.int64
            ),
            labels=labels,
            text_token_counts=tuple(len(sample.ids) for sample in samples),
            modalities=tuple(spans),
            values=values,
            weights=torch.tensor(
                [
                    0.0 if is_empty or sample.skipped_sample is not None else 1.0
                    for sample in samples
                ]
            ),
            sample_ids=() if is_empty else tuple(sample_ids),
            is_empty=is_empty,
            skipped_samples={
                i: sample.skipped_sample
                for i, sample in enumerate(samples)
                if sample.skipped_sample is not None
            },
            supervised=(labels != IGNORE).nonzero().squeeze(1),
        )


@contextlib.contextmanager
def _decoding(kind: Modality, sample_id: str) -> Iterator[None]:
    """A decoder's surprise at a strange file is that file's fault: a SampleError. No memory and no disk are the machine's.

    (A StopIteration least of all may pass: whoever iterates over batches would take it for their end.)
    """
    try:
        yield
    except OneLLMError:
        raise
    except (MemoryError, OSError) as error:
        raise OneLLMError(
            f"sample {sample_id}, {kind.name}: {type(error).__name__}: {error}",
            "the machine failed, not the sample: it is not left out.",
            "look at the node's memory, its limit of open files and its disks, and start again.",
        ) from error
    except Exception as error:
        if "allocate memory" in str(error):  # torch's, a RuntimeError
            raise OneLLMError(
                f"sample {sample_id}, {kind.name}: {error}",
                "it is not left out.",
                "use fewer loader workers (data.workers).",
            ) from error
        raise SampleError(
            f"unreadable {kind.name}: {type(error).__name__}: {error}", "it cannot be decoded."
        ) from error


def _check_value(kind: Modality, value: torch.Tensor, sample_id: str) -> None:
    if tuple(value.shape) != tuple(kind.value_shape) or value.dtype != torch.float32:
        raise OneLLMError(
            f"sample {sample_id}: modality {kind.name} gave {tuple(value.shape)} {value.dtype}, not {tuple(kind.value_shape)} float32",
            "this is a fault of the program, not of the data.",
            "report it with the sample's id.",
        )
