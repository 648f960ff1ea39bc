"""The shape of a micro-batch: how many samples of which modalities, with texts of which lengths.

Everything that a micro-batch costs follows from a few sums over its samples (`PackSizes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from onellm_dist.modalities import Modality
from onellm_dist.modalities.base import SPAN_TOKENS
from onellm_dist.packed import PackedBatch


@dataclass(frozen=True)
class SampleShape:
    """A sample, without its content."""

    spans: tuple[str, ...]
    """Modality of each of its media spans, in span order."""
    text_tokens: int
    """Tokens of its text, BOS included."""
    supervised_tokens: int
    """Text tokens that are training targets."""
    answers: int = 1
    """2: a preference pair, whose counts are those of both texts."""

    @property
    def llm_tokens(self) -> int:
        """LLM positions: text tokens and media spans."""
        return self.text_tokens + self.answers * SPAN_TOKENS * len(self.spans)


PackShape = tuple[SampleShape, ...]
"""The samples of a micro-batch."""


@dataclass(frozen=True)
class PackSizes:
    """Sums over the samples of a micro-batch, on which its operations depend linearly."""

    values: Mapping[str, float]
    """Name of a sum to its value; `get` has the names."""

    def get(self, name: str) -> float:
        """One sum.

        Args:
            name: `one`; `text`, `supervised` (tokens); `positions`, `pairs.llm` (LLM); `spans`, and
                `spans.NAME` of a modality; `frames`, `pairs.visual` (pictures in the encoder, and
                `spans.visual`); `pixels` (those that arrive as bytes); `tokenized`,
                `pairs.tokenized` (tokens of tokenizers in the
                encoder); `upm`, `pairs.upm` (tokens in the UPM).
        """
        return self.values.get(name, 0.0)


def measure_sizes(pack: PackShape, modalities: Mapping[str, Modality]) -> PackSizes:
    """The sums of a micro-batch.

    Args:
        pack: its samples.
        modalities: name to modality, with the token counts of the model's encoder.
    """
    found: dict[str, float] = {"one": 1.0}
    for sample, count in Counter(pack).items():

        def add(name: str, value: float, count: int = count) -> None:
            found[name] = found.get(name, 0.0) + count * value

        add("text", sample.text_tokens)
        add("supervised", sample.supervised_tokens)
        add("positions", sample.llm_tokens)
        add("pairs.llm", sample.llm_tokens**2 / 2 / sample.answers)
        for name in sample.spans:
            modality = modalities[name]
            length = modality.prefix_tokens + modality.tokens
            add("spans", 1)
            add(f"spans.{name}", 1)
            if modality.visual:
                add("spans.visual", 1)
                add("frames", modality.frames)
                add("pixels", modality.frames * (modality.loader_dtype == torch.uint8))
                add("pairs.visual", modality.frames * length**2)
            else:
                add("tokenized", length)
                add("pairs.tokenized", length**2)
            add("upm", modality.upm_tokens)
            add("pairs.upm", modality.upm_tokens**2)
    return PackSizes(found)


def make_meta_batch(pack: PackShape, modalities: Sequence[Modality]) -> PackedBatch:
    """A micro-batch of this shape on the meta device.

    Args:
        pack: its samples.
        modalities: those of the model.
    """
    meta = torch.device("meta")
    counts = {m.name: sum(s.spans.count(m.name) for s in pack) for m in modalities}
    text = sum(sample.text_tokens for sample in pack)
    return PackedBatch(
        input_ids=torch.empty(text, dtype=torch.int64, device=meta),
        labels=torch.empty(text, dtype=torch.int64, device=meta),
        text_token_counts=tuple(sample.text_tokens for sample in pack),
        modalities=tuple(sample.spans for sample in pack),
        values={
            m.name: torch.empty((counts[m.name], *m.value_shape), dtype=m.loader_dtype, device=meta)
            for m in modalities
        },
        weights=torch.empty(len(pack), device=meta),
        supervised=torch.empty(
            sum(sample.supervised_tokens for sample in pack), dtype=torch.int64, device=meta
        ),
        chosen_tokens=tuple(sample.text_tokens // 2 for sample in pack)
        if any(sample.answers == 2 for sample in pack)
        else (),
    )


def count_batch_bytes(batch: PackedBatch) -> int:
    """Bytes of a micro-batch's own tensors on the device."""
    return sum(tensor.nbytes for tensor in batch.tensors())
