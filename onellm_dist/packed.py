"""The value that travels from the loader to the model: one micro-batch as one packed sequence of mixed modalities."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

IGNORE = -100
"""Label of a token that is not supervised."""


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch without padding: n whole samples, one behind the other.

    The LLM sequence of sample i is `BOS, runs of its modalities (32 positions each), the rest of its text`; the model
    works the layout out from `text_token_counts` and `modalities` (`model/layout.py`), nothing else describes it.

    Attributes:
        input_ids: [T_text] int64, the samples' text tokens, BOS first each.
        labels: [T_text] int64, `input_ids` where supervised, else IGNORE (aligned: position t is the target of the
            LLM position before it; a sample's BOS is never supervised).
        text_token_counts: tokens of text of each sample, n integers >= 1.
        modalities: the modality names of each sample, in the order of its runs (empty: text only).
        values: every modality of the model -> [n_m, *value_shape] in the order of samples; n_m = 0 is normal.
        weights: [n] fp32 loss weight of each sample: 1, or 0 for a skipped_sample and for a dummy.
        sample_ids: `dataset/shard-name/key@epoch` of each sample.
        is_empty: this rank was dealt nothing in this micro-step; the pack is one text token of zero weight.
        skipped_samples: indices of samples that could not be read, with the reason.
        supervised: [N] int64 places of `labels` that are no IGNORE, or None where nobody counted them. `to` counts before it
            moves to a GPU, where counting would drain the queue.
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

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> PackedBatch:
        """The same batch with its tensors on `device`."""

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
        )

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (the torch DataLoader calls this by name)."""
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
        )


@dataclass(frozen=True)
class PackedOutput:
    """What the model returns for a PackedBatch.

    Attributes:
        loss: [] fp32, the SUM over supervised tokens of weight x cross-entropy (the loop divides by the plan's count).
        nll: [N] fp32, detached cross-entropy of each supervised token, unweighted.
        sample_index: [N] int64, the sample of each supervised token.
        router_weights: modality -> [Q, E] fp32, detached (they do not depend on the input).
    """

    loss: torch.Tensor
    nll: torch.Tensor
    sample_index: torch.Tensor
    router_weights: dict[str, torch.Tensor] = field(default_factory=dict)
