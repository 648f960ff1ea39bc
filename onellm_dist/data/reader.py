"""From MicroBatch to PackedBatch: reads, decodes and transforms the samples of one micro-batch.

A sample that cannot be read or decoded keeps its place as a skipped sample: zero values, as many
text tokens as planned, weight 0. No other sample replaces it.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.common.placeholders import PlacedMedium
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.common.workers.sandbox import Sandbox
from onellm_dist.data.cache import ChunkCache
from onellm_dist.data.corpus import Corpus
from onellm_dist.data.medium_reader import LocatedMedium, MediumReader
from onellm_dist.data.micro_batch import MicroBatch, SampleRef
from onellm_dist.data.pair_text import encode_pair
from onellm_dist.data.read_ahead import ByteRange, ReadAhead
from onellm_dist.data.retry import open_index_with_retries, read_span_with_retries
from onellm_dist.data.text_parts import read_meta
from onellm_dist.data.token_counts import UNREADABLE, get_token_count_path
from onellm_dist.data.value_rows import ValueRows
from onellm_dist.modalities.base import Part
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.shards.format.media import get_medium_meta, match_medium
from onellm_dist.shards.format.parts import SampleSpan, extract_parts, get_parts_span

_GROUP_BYTES = 4 << 20
"""Bytes of the samples that are prepared together; a larger sample is alone."""
_Values: TypeAlias = dict[str, list[torch.Tensor]]
"""Modality to the model input of each of a sample's spans, in the order of the sequence."""


@dataclass(frozen=True)
class _Sample:
    """A sample as it enters the pack, without its values."""

    ids: Sequence[int]
    labels: Sequence[int]
    spans: tuple[str, ...] = ()
    """The modality of each span, in the order of the sequence."""
    places: tuple[int, ...] = ()
    """Text tokens before each span; empty: all stand behind BOS."""
    numbers: tuple[int, ...] = ()
    """The number of each span within its medium; empty: each medium takes one span."""
    reason: str | None = None
    """Why the sample is skipped; None: it was read."""
    chosen_tokens: int = 0
    """Tokens of the first text of a pair."""


class _Medium(NamedTuple):
    """One medium of a sample whose bytes were read, to be decoded."""

    located: LocatedMedium
    meta: Mapping[str, Any]
    rng: np.random.Generator


class _Prepared(NamedTuple):
    """A sample whose bytes were read and whose text was encoded."""

    sample: _Sample
    parts: Mapping[str, Part] = MappingProxyType({})
    media: Sequence[_Medium] = ()
    """In the order of the sequence."""


class _Location(NamedTuple):
    """Where a sample's bytes lie."""

    media: tuple[LocatedMedium, ...]
    parts: SampleSpan
    bytes: ByteRange


class Reader:
    """Reads the micro-batches of a plan.

    What it returns depends on the MicroBatch alone, as long as the disk works.

    Args:
        corpus: what the plan was made from.
        skipped_samples: sample id to reason, for samples that an earlier start of the run could
            not read. They are not tried again, so that a resumed run sees what the first one saw.

    Attributes:
        sandbox: the limits of a sample; set in a loader worker.
    """

    def __init__(self, corpus: Corpus, skipped_samples: Mapping[str, str] | None = None) -> None:
        self._corpus = corpus
        self._skipped_samples = dict(skipped_samples or {})
        config = corpus.config
        self._cache = (
            ChunkCache(config.cache_dir, int(config.cache_gb * 1e9)) if config.cache_dir else None
        )
        self._process_read_ahead: tuple[int, ReadAhead] | None = None
        self._locations: dict[SampleRef, _Location] = {}
        self._medium_reader = MediumReader(corpus.modalities, corpus.seed, augment=config.augment)
        self.sandbox = Sandbox()

    def get_sample_id(self, micro: MicroBatch, index: int) -> str:
        """Id of a sample of a micro-batch."""
        return self._corpus.sample_id(micro.samples[index])

    def skip(self, sample_id: str, reason: str) -> None:
        """Read a sample as a skipped one from now on."""
        self._skipped_samples[sample_id] = reason

    def read(self, micro: MicroBatch, ahead: MicroBatch | None = None) -> PackedBatch:
        """Read a micro-batch.

        Args:
            micro: the micro-batch.
            ahead: the one this process is asked for next; its bytes are fetched meanwhile.

        Returns:
            The packed samples, or one BOS of zero weight if the micro-batch is empty.

        Raises:
            OneLLMError: a text has another length than the plan assumes, or an index is damaged.
        """
        corpus = self._corpus
        if micro.is_empty:
            placeholder = _Sample([corpus.text_encoder.bos], [IGNORE])
            return self._pack([placeholder], [""], ValueRows(corpus.modalities, ()), is_empty=True)
        ids = corpus.sample_ids(micro.samples)
        known = self._locations
        self._locations = {}
        now = self._locate_all(micro.samples, known)
        later = self._locate_all(ahead.samples if ahead else (), known)
        self._read_ahead.request(now, later)
        spans = (name for ref in micro.samples for name in corpus.list_spans(ref))
        rows = ValueRows(corpus.modalities, spans)
        samples = [
            sample
            for group in self._group(micro.samples)
            for sample in self._read_group(micro.samples, ids, group, rows)
        ]
        return self._pack(samples, ids, rows, is_empty=False)

    def _read_group(
        self, refs: Sequence[SampleRef], ids: Sequence[str], group: range, rows: ValueRows
    ) -> Iterator[_Sample]:
        """Prepare the samples of a group, then decode each; its bytes are freed behind it.

        Either part of a sample has the limits of one (`data.sample_seconds`, `data.sample_mb`).
        """
        prepared = deque[_Prepared]()
        for index in group:
            with self.sandbox.sample(index):
                prepared.append(self._prepare_or_skip(refs[index], ids[index]))
        for index in group:
            if not prepared[0].media and prepared[0].sample.reason is None:
                yield prepared.popleft().sample
                continue
            with self.sandbox.sample(index):
                sample, values = self._decode_or_skip(refs[index], ids[index], prepared.popleft())
                rows.add(values)
            yield sample

    def _group(self, refs: Sequence[SampleRef]) -> Iterator[range]:
        """Yield the positions of samples that are prepared together, before any is decoded.

        Tokenizer and decoders push each other out of the processor's caches: a text costs a third
        of the time where others were encoded just before.
        """
        found = [self._locations.get(ref) for ref in refs]
        sizes = [one.bytes.end - one.bytes.start if one else _GROUP_BYTES for one in found]
        return group_samples(sizes, _GROUP_BYTES)

    @property
    def _read_ahead(self) -> ReadAhead:
        """The read-ahead of this process; a forked process gets its own."""
        if self._process_read_ahead is None or self._process_read_ahead[0] != os.getpid():
            limit = self._corpus.config.read_ahead_mb << 20
            self._process_read_ahead = os.getpid(), ReadAhead(self._cache, limit)
        return self._process_read_ahead[1]

    def _locate_all(
        self, refs: Sequence[SampleRef], known: Mapping[SampleRef, _Location]
    ) -> list[ByteRange]:
        """Return where samples lie; a sample that cannot be located is reported when it is read."""
        ranges = []
        for ref in refs:
            with contextlib.suppress(OneLLMError):
                location = self._locations[ref] = known.get(ref) or self._locate(ref)
                ranges.append(location.bytes)
        return ranges

    def _locate(self, ref: SampleRef) -> _Location:
        corpus = self._corpus
        dataset, shard = corpus.shard_of(ref)
        stored = dataset.index(shard).parts(ref.row)
        if corpus.media.varied[ref.dataset]:
            media = tuple(
                LocatedMedium(name, prefix, match_medium(name, prefix, stored), spans)
                for name, prefix, spans in corpus.media.get(ref)
            )
        else:
            media = tuple(
                LocatedMedium(name, "", corpus.modalities[name].match(stored))
                for name in corpus.spans[ref.dataset]
            )
        wanted = {*TEXT_EXTENSIONS, *(e for m in media for e in m.extensions.values())}
        parts = get_parts_span(stored, wanted)
        return _Location(media, parts, ByteRange(dataset, shard, parts.start, parts.end))

    def _read_parts(self, ref: SampleRef, location: _Location) -> dict[str, Part]:
        """Read a sample's parts: from what was fetched ahead if it is intact, else from the tar."""
        dataset, shard = location.bytes.dataset, location.bytes.shard
        data = self._read_ahead.load(location.bytes)
        if data is not None:
            try:
                return extract_parts(dataset, shard, ref.row, location.parts, data)
            except SampleError:
                self._read_ahead.discard(location.bytes)
        return read_span_with_retries(dataset, shard, ref.row, location.parts)

    def _prepare_or_skip(self, ref: SampleRef, sample_id: str) -> _Prepared:
        reason = self._skipped_samples.get(sample_id)
        reason = reason or self._corpus.exclusions.find(sample_id)
        if reason is not None:
            return _Prepared(self._skip(ref, reason))
        try:
            return self._prepare(ref, sample_id)
        except SampleError as error:
            return _Prepared(self._skip(ref, f"{sample_id}: {error.what}"))

    def _prepare(self, ref: SampleRef, sample_id: str) -> _Prepared:
        """Read a sample's bytes and encode its text."""
        corpus = self._corpus
        location = self._locations.get(ref)
        if location is None:
            open_index_with_retries(*corpus.shard_of(ref))
            location = self._locate(ref)
        parts = self._read_parts(ref, location)
        self.sandbox.decode()
        choose = partial(corpus.caption_index, ref)
        media, encoder = location.media, corpus.media_encoder(ref.dataset)
        names = None if encoder is None else [medium.modality for medium in media]
        chosen_tokens, order = 0, [PlacedMedium(number, 1) for number in range(len(media))]
        if corpus.text_encoder.pairs:
            pair = encode_pair(encoder or corpus.text_encoder, parts, names)
            ids, labels, chosen_tokens = pair[:3]
            order = order if encoder is None else pair.media
        elif encoder is None:
            ids, labels = corpus.text_encoder.encode(parts, choose)
        else:
            ids, labels, order = encoder.encode_media(parts, names or (), choose)
        self._check_token_counts(ref, sample_id, ids, labels)
        meta = read_meta(parts)
        ordered: list[_Medium] = []
        places: list[int] = []
        for number, place in order:
            medium = media[number]
            own = meta if encoder is None else get_medium_meta(meta, number)
            rng = self._medium_reader.build_rng(sample_id, medium)
            ordered.append(_Medium(medium, own, rng))
            places += [place] * medium.spans
        numbers = [number for m in ordered for number in range(m.located.spans)]
        sample = _Sample(
            ids,
            labels,
            tuple(m.located.modality for m in ordered for _ in range(m.located.spans)),
            () if places.count(1) == len(places) else tuple(places),
            tuple(numbers) if any(numbers) else (),
            chosen_tokens=chosen_tokens,
        )
        return _Prepared(sample, parts, ordered)

    def _decode_or_skip(
        self, ref: SampleRef, sample_id: str, prepared: _Prepared
    ) -> tuple[_Sample, _Values]:
        sample = prepared.sample
        if sample.reason is None:
            self.sandbox.decode()
            try:
                return sample, self._decode(sample_id, prepared)
            except SampleError as error:
                sample = self._skip(ref, f"{sample_id}: {error.what}")
        return sample, self._make_zeros(sample.spans)

    def _decode(self, sample_id: str, prepared: _Prepared) -> _Values:
        values: _Values = {}
        for medium, meta, rng in prepared.media:
            spans = self._medium_reader.read(sample_id, medium, prepared.parts, meta, rng)
            values.setdefault(medium.modality, []).extend(spans)
        return values

    def _check_token_counts(
        self, ref: SampleRef, sample_id: str, ids: Sequence[int], labels: Sequence[int]
    ) -> None:
        planned = (ref.text_tokens, ref.supervised_tokens)
        if planned == UNREADABLE:
            raise SampleError(
                "its text could not be read when tokens were counted",
                "it was planned as a skipped sample.",
            )
        found = (len(ids), sum(label >= 0 for label in labels))
        if found != planned:
            dataset, shard = self._corpus.shard_of(ref)
            path = get_token_count_path(dataset, shard, self._corpus.text_encoder.fingerprint)
            raise OneLLMError(
                f"stale token counts {path}: sample {sample_id} has {found[0]} text tokens "
                f"({found[1]} supervised), the file says {planned[0]} ({planned[1]})",
                "this run's plan was computed from them, and the loss is divided by them.",
                "delete the file and restart; the tokens are counted again.",
            )

    def _skip(self, ref: SampleRef, reason: str) -> _Sample:
        """A sample of zero weight in the place of one that cannot be read."""
        corpus = self._corpus
        ids = [corpus.text_encoder.bos] * ref.text_tokens
        labels = [IGNORE] * ref.text_tokens
        # Of a pair, halves: neither is longer than the longer of its texts.
        half = ref.text_tokens // 2 if corpus.text_encoder.pairs else 0
        spans = corpus.list_spans(ref)
        return _Sample(ids, labels, spans, reason=reason, chosen_tokens=half)

    def _make_zeros(self, spans: Sequence[str]) -> _Values:
        zeros: _Values = {}
        for name in spans:
            modality = self._corpus.modalities[name]
            value = torch.zeros(modality.value_shape, dtype=modality.loader_dtype)
            zeros.setdefault(name, []).append(value)
        return zeros

    def _pack(
        self,
        samples: Sequence[_Sample],
        sample_ids: Sequence[str],
        rows: ValueRows,
        *,
        is_empty: bool,
    ) -> PackedBatch:
        ids = [token for sample in samples for token in sample.ids]
        labels = torch.tensor(
            [label for sample in samples for label in sample.labels], dtype=torch.int64
        )
        return PackedBatch(
            input_ids=torch.tensor(ids, dtype=torch.int64),
            labels=labels,
            text_token_counts=tuple(len(sample.ids) for sample in samples),
            modalities=tuple(sample.spans for sample in samples),
            values=rows.finish(),
            weights=torch.tensor(
                [0.0 if is_empty or sample.reason is not None else 1.0 for sample in samples]
            ),
            sample_ids=() if is_empty else tuple(sample_ids),
            is_empty=is_empty,
            skipped_samples={
                i: sample.reason for i, sample in enumerate(samples) if sample.reason is not None
            },
            supervised=(labels != IGNORE).nonzero().squeeze(1),
            places=tuple(s.places or (1,) * len(s.spans) for s in samples)
            if any(s.places for s in samples)
            else (),
            span_numbers=tuple(s.numbers or (0,) * len(s.spans) for s in samples)
            if any(s.numbers for s in samples)
            else (),
            chosen_tokens=tuple(s.chosen_tokens for s in samples)
            if self._corpus.text_encoder.pairs
            else (),
        )


def group_samples(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Yield the positions of samples whose bytes are at most `limit` together, or one alone."""
    first = held = 0
    for index, size in enumerate(sizes):
        if index > first and held + size > limit:
            yield range(first, index)
            first, held = index, 0
        held += size
    yield range(first, len(sizes))
