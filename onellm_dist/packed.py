"""What travels from the loader to the model: one micro-batch as one packed sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

IGNORE = -100
"""Label of a token that is not supervised."""


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch without padding: n complete samples, concatenated end to end.

    The LLM sequence of sample i is its text with spans of 32 positions at their places: by default
    `BOS, one span for each of its modalities, the rest of its text`. The model derives this layout
    from `text_token_counts`, `modalities` and `places` (`model/spans/layout.py`); nothing else
    describes it.

    Attributes:
        input_ids: [T_text] int64, text tokens of the samples, each beginning with BOS.
        labels: [T_text] int64, `input_ids` where supervised, else IGNORE. Position t is the target
            of the LLM position before it; the BOS of a sample is never supervised.
        text_token_counts: number of text tokens of each sample, n integers >= 1.
        modalities: modality of each span of each sample, in the order of the sequence; empty for
            text only.
        values: each modality of the model -> [n_m, *value_shape] in the order of the samples and of
            their spans, fp32 or, of pictures, 8-bit pixels (`Modality.loader_dtype`); n_m = 0 is
            normal.
        weights: [n] fp32 loss weight of each sample: 1, or 0 for a skipped sample and for the
            placeholder of an empty micro-batch.
        sample_ids: `dataset/shard-name/key@epoch` of each sample.
        is_empty: the rank receives no samples in this micro-batch; the pack is one text token of
            zero weight.
        skipped_samples: index of a sample that could not be read -> the reason.
        supervised: [N] int64 positions of `labels` that are not IGNORE, or None if they have not
            been counted. `to` counts them before a move to a GPU, where counting would make the
            host wait for the device.
        places: for each span of each sample, how many of its text tokens stand before it, BOS
            included, ascending; () if all spans stand behind BOS.
        span_numbers: for each span of each sample, its number within its medium: 0, 1, ...; () if
            every medium takes one span.
        chosen_tokens: of preference pairs, for each sample the text tokens of its first text, with
            the chosen answer; the rest is the text with the rejected one. Each of the two is a
            sequence of its own, and the sample's spans, whose values are there once, stand at the
            same places in both. 0: a single text that was left out. () if samples are not pairs.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    text_token_counts: tuple[int, ...]
    modalities: tuple[tuple[str, ...], ...]
    values: dict[str, torch.Tensor]
    weights: torch.Tensor
    sample_ids: tuple[str, ...] = ()
    is_empty: bool = False
    skipped_samples: dict[int, str] = field(default_factory=dict)
    supervised: torch.Tensor | None = None
    places: tuple[tuple[int, ...], ...] = ()
    span_numbers: tuple[tuple[int, ...], ...] = ()
    chosen_tokens: tuple[int, ...] = ()

    def tensors(self) -> list[torch.Tensor]:
        """All its tensors."""
        counted = [] if self.supervised is None else [self.supervised]
        return [self.input_ids, self.labels, self.weights, *self.values.values(), *counted]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> PackedBatch:
        """Copy the batch's tensors to `device`."""

        def move(t: torch.Tensor) -> torch.Tensor:
            return t.to(device, non_blocking=non_blocking)

        supervised = self.supervised
        if supervised is None and self.labels.device.type == "cpu":
            supervised = (self.labels != IGNORE).nonzero().squeeze(1)
        return PackedBatch(
            move(self.input_ids),
            move(self.labels),
            self.text_token_counts,
            self.modalities,
            {k: move(v) for k, v in self.values.items()},
            move(self.weights),
            self.sample_ids,
            self.is_empty,
            self.skipped_samples,
            None if supervised is None else move(supervised),
            self.places,
            self.span_numbers,
            self.chosen_tokens,
        )

    def pin_memory(self) -> PackedBatch:
        """Copy the batch to page-locked memory (the torch DataLoader calls this by name)."""
        return PackedBatch(
            self.input_ids.pin_memory(),
            self.labels.pin_memory(),
            self.text_token_counts,
            self.modalities,
            {k: v.pin_memory() for k, v in self.values.items()},
            self.weights.pin_memory(),
            self.sample_ids,
            self.is_empty,
            self.skipped_samples,
            None if self.supervised is None else self.supervised.pin_memory(),
            self.places,
            self.span_numbers,
            self.chosen_tokens,
        )


@dataclass(frozen=True)
class PackedOutput:
    """What the model returns for a PackedBatch.

    Attributes:
        loss: [] fp32, the sum over supervised tokens of weight x cross-entropy; training divides
            it by `loss_count` of the plan. With pairs, the sum over pairs of weight x loss.
        nll: [N] fp32, detached cross-entropy of each supervised token, unweighted. With pairs, the
            loss of each.
        sample_index: [N] int64, the sample of each supervised token, or of each pair.
        router_weights: modality -> [Q, E] fp32, detached (they do not depend on the input).
        rewards: of pairs, [N, 2] fp32, detached: the rewards of the chosen and the rejected answer.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    sample_index: torch.Tensor
    router_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    rewards: torch.Tensor | None = None
