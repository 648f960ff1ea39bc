"""From MicroBatch to PackedBatch: reads, decodes and transforms the samples of one micro-batch.

A sample that cannot be read or decoded keeps its place as a skipped sample: zero values, as many
text tokens as planned, weight 0. No other sample replaces it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import MachineError, OneLLMError, SampleError
from onellm_dist.common.placeholders import PlacedMedium
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.common.workers.sandbox import OutOfMemoryError, Sandbox, is_out_of_memory
from onellm_dist.data.cache import ChunkCache
from onellm_dist.data.corpus import Corpus
from onellm_dist.data.micro_batch import MicroBatch, SampleRef
from onellm_dist.data.order import derive_key
from onellm_dist.data.pair_text import encode_pair
from onellm_dist.data.read_ahead import ByteRange, ReadAhead
from onellm_dist.data.retry import open_index_with_retries, read_span_with_retries
from onellm_dist.data.text_parts import read_meta
from onellm_dist.data.token_counts import UNREADABLE, get_token_count_path
from onellm_dist.data.value_rows import ValueRows
from onellm_dist.modalities import Modality
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.library_faults import require_library
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.shards.format.media import get_medium_meta, match_medium
from onellm_dist.shards.format.parts import SampleSpan, extract_parts, get_parts_span


@dataclass(frozen=True)
class _Sample:
    """A sample as it enters the pack."""

    ids: Sequence[int]
    labels: Sequence[int]
    values: Mapping[str, Sequence[torch.Tensor]]
    """Modality to the model input of each of its spans, in the order of the sequence."""
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


class _LocatedMedium(NamedTuple):
    """One medium of a sample."""

    modality: str
    prefix: str
    extensions: dict[str, str]
    """Role of a part to extension."""
    spans: int = 1


class _Location(NamedTuple):
    """Where a sample's bytes lie."""

    media: tuple[_LocatedMedium, ...]
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
            placeholder = _Sample([corpus.text_encoder.bos], [IGNORE], {})
            return self._pack([placeholder], [""], ValueRows(corpus.modalities, ()), is_empty=True)
        ids = corpus.sample_ids(micro.samples)
        known = self._locations
        self._locations = {}
        now = self._locate_all(micro.samples, known)
        later = self._locate_all(ahead.samples if ahead else (), known)
        self._read_ahead.request(now, later)
        samples = []
        spans = (name for ref in micro.samples for name in corpus.list_spans(ref))
        rows = ValueRows(corpus.modalities, spans)
        for index, (ref, name) in enumerate(zip(micro.samples, ids, strict=True)):
            with self.sandbox.sample(index):
                sample = self._read_or_skip(ref, name)
                rows.add(sample.values)
            samples.append(replace(sample, values={}))
        return self._pack(samples, ids, rows, is_empty=False)

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
                _LocatedMedium(name, prefix, match_medium(name, prefix, stored), spans)
                for name, prefix, spans in corpus.media.get(ref)
            )
        else:
            media = tuple(
                _LocatedMedium(name, "", corpus.modalities[name].match(stored))
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

    def _read_or_skip(self, ref: SampleRef, sample_id: str) -> _Sample:
        reason = self._skipped_samples.get(sample_id)
        reason = reason or self._corpus.exclusions.find(sample_id)
        if reason is not None:
            return self._skip(ref, reason)
        try:
            return self._read(ref, sample_id)
        except SampleError as error:
            return self._skip(ref, f"{sample_id}: {error.what}")

    def _read(self, ref: SampleRef, sample_id: str) -> _Sample:
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
        values: dict[str, list[torch.Tensor]] = {}
        spans: list[str] = []
        places: list[int] = []
        numbers: list[int] = []
        for number, place in order:
            medium = media[number]
            own = meta if encoder is None else get_medium_meta(meta, number)
            values.setdefault(medium.modality, []).extend(
                self._read_medium(sample_id, medium, parts, own)
            )
            spans += [medium.modality] * medium.spans
            places += [place] * medium.spans
            numbers += range(medium.spans)
        return _Sample(
            ids,
            labels,
            values,
            tuple(spans),
            () if places.count(1) == len(places) else tuple(places),
            tuple(numbers) if any(numbers) else (),
            chosen_tokens=chosen_tokens,
        )

    def _read_medium(
        self,
        sample_id: str,
        medium: _LocatedMedium,
        parts: Mapping[str, Part],
        meta: Mapping[str, Any],
    ) -> list[torch.Tensor]:
        """Read the spans of one medium: [*value_shape] each."""
        modality = self._corpus.modalities[medium.modality]
        prefix = f"{medium.prefix}." if medium.prefix else ""
        own = {
            role: replace(parts[e], extension=e.removeprefix(prefix)) if prefix else parts[e]
            for role, e in medium.extensions.items()
        }
        with _translate_errors(modality, sample_id):
            rng = self._build_rng(modality, f"{sample_id} {medium.prefix}" if prefix else sample_id)
            train = self._corpus.config.augment
            if medium.spans == 1:
                raw = modality.decode(own, meta)
                values = [modality.make_loader_value(raw, train=train, rng=rng)]
            else:
                values = modality.read_spans(
                    own, meta, spans=medium.spans, train=train, rng=rng, for_loader=True
                )
        if len(values) != medium.spans:
            raise OneLLMError(
                f"sample {sample_id}: modality {modality.name} returned "
                f"{format_count(len(values), 'value')} for {format_count(medium.spans, 'span')}",
                f"this is a fault of {type(modality).__module__}, not of the data.",
                "report it to whoever made that modality, with the sample's id.",
            )
        for value in values:
            _check_value(modality, value, sample_id)
        return values

    def _build_rng(self, modality: Modality, sample_id: str) -> np.random.Generator:
        """Seed by run, sample, epoch and medium; never by worker, rank or earlier reads."""
        key = derive_key("augment", self._corpus.seed, sample_id, modality.name)
        return np.random.Generator(np.random.PCG64(key))

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
        corpus, spans = self._corpus, self._corpus.list_spans(ref)
        zeros: dict[str, list[torch.Tensor]] = {}
        for name in spans:
            modality = corpus.modalities[name]
            value = torch.zeros(modality.value_shape, dtype=modality.loader_dtype)
            zeros.setdefault(name, []).append(value)
        ids = [corpus.text_encoder.bos] * ref.text_tokens
        labels = [IGNORE] * ref.text_tokens
        # Of a pair, halves: neither is longer than the longer of its texts.
        half = ref.text_tokens // 2 if corpus.text_encoder.pairs else 0
        return _Sample(ids, labels, zeros, spans, reason=reason, chosen_tokens=half)

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


@contextlib.contextmanager
def _translate_errors(modality: Modality, sample_id: str) -> Iterator[None]:
    """Turn a decoder's unexpected exception into a SampleError: the file is bad.

    Lack of memory and disk errors are the machine's fault and become a MachineError. A
    StopIteration must not escape: whoever iterates over batches would take it for the end.
    """
    try:
        yield
    except OneLLMError:
        raise
    except (MemoryError, OSError) as error:
        raise (OutOfMemoryError if is_out_of_memory(error) else MachineError)(
            f"sample {sample_id}, {modality.name}: {type(error).__name__}: {error}",
            "the machine failed, not the sample, so the sample is not skipped.",
            "check the node's memory, its limit of open files and its disks, and restart.",
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"sample {sample_id}, {modality.name}: {error}",
                "the machine failed, not the sample, so the sample is not skipped.",
                "use fewer loader processes (data.workers).",
            ) from error
        require_library(error)
        raise SampleError(
            f"unreadable {modality.name}: {type(error).__name__}: {error}",
            "it cannot be decoded.",
        ) from error


def _check_value(modality: Modality, value: torch.Tensor, sample_id: str) -> None:
    shape = tuple(modality.value_shape)
    if tuple(value.shape) != shape or value.dtype != modality.loader_dtype:
        raise OneLLMError(
            f"sample {sample_id}: modality {modality.name} returned {tuple(value.shape)} "
            f"{value.dtype} instead of {shape} {modality.loader_dtype}",
            "this is a fault of the program, not of the data.",
            "report it with the sample's id.",
        )
