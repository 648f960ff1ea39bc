"""Padded batches: media spans behind each text's first token, and the loss over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.model.llm.per_layer import MEDIA
from onellm_dist.packed import IGNORE

VALUES_SUFFIX = "_values"
"""Ending of forward's keyword arguments with the values of a modality: `image_values`."""


@dataclass(frozen=True)
class PaddedInputs:
    """A padded batch as the LLM reads it, with R positions of media spans in every row.

    Attributes:
        embeds: [B, S + R, d] embeddings.
        mask: [B, S + R] int64, 1 for real positions.
        position_ids: [B, S + R]; real positions count 0, 1, ...
        text: [B, S + R], index of the text token at each position; -1 inside a span.
        media_positions: R.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    text: torch.Tensor
    media_positions: int

    def get_token_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Id of the token at each position; MEDIA inside a span: [B, S + R].

        Args:
            input_ids: [B, S], the text.
        """
        ids = input_ids.gather(1, self.text.clamp(0, input_ids.shape[1] - 1))
        return torch.where(self.text < 0, MEDIA, ids)


def check_values(
    values: Mapping[str, Any], modalities: Sequence[str], batch: int | None
) -> dict[str, torch.Tensor]:
    """The values that were given, by modality.

    Args:
        values: `image_values` and so on -> [B, *value_shape], or None.
        modalities: names of the modalities that the model reads.
        batch: B; None: there may be any number of rows.

    Raises:
        UsageError: an unknown name, or another number of rows than B.
    """
    given = {key: value for key, value in values.items() if value is not None}
    known = {name + VALUES_SUFFIX for name in modalities}
    if unknown := sorted(set(given) - known):
        raise UsageError(
            f"unknown input {', '.join(unknown)}",
            "the model would ignore it.",
            f"it takes {', '.join(sorted(known))}.",
        )
    for key, value in given.items():
        if batch is not None and len(value) != batch:
            raise UsageError(
                f"{key} has {format_count(len(value), 'row')} for {format_count(batch, 'text')}",
                "every text needs one row.",
                "give as many rows as texts.",
            )
    return {key.removesuffix(VALUES_SUFFIX): value for key, value in given.items()}


def get_span_order(
    given: Mapping[str, Any], modalities: Sequence[str], order: Sequence[str] | None
) -> list[str]:
    """Names of the modalities that were given, in the order of their spans.

    Args:
        given: by modality.
        modalities: names of the modalities that the model reads, in its own order.
        order: the order asked for; default: the model's own.

    Raises:
        UsageError: `order` does not name each given modality once.
    """
    names = [name for name in modalities if name in given]
    if order is None:
        return names
    if sorted(order) != sorted(names):
        raise UsageError(
            f"modality_order={list(order)} for values of {names}",
            "it must name each modality once.",
            "name exactly the modalities that have values.",
        )
    return list(order)


def find_text_starts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Index of each text's first unmasked token: [B, S] -> [B]."""
    if attention_mask is None:
        return input_ids.new_zeros(len(input_ids))
    return attention_mask.to(torch.int64).argmax(1)


def insert_spans(
    text: torch.Tensor,
    attention_mask: torch.Tensor | None,
    spans: torch.Tensor,
    starts: torch.Tensor,
) -> PaddedInputs:
    """Put media spans into texts, after one position of each row.

    Args:
        text: [B, S, d] text embeddings.
        attention_mask: [B, S], 0 for padding.
        spans: [B, R, d] embeddings of all spans of a row, end to end.
        starts: [B] position of each row after which its spans stand.
    """
    batch, length, width = text.shape
    count = spans.shape[1]
    at = torch.arange(length + count, device=text.device).expand(batch, length + count)
    start = starts[:, None]
    in_span = (at > start) & (at <= start + count)
    token = torch.where(at <= start, at, at - count)
    source = torch.where(in_span, length + at - start - 1, token)
    embeds = torch.cat([text, spans], 1).gather(
        1, source[..., None].expand(batch, length + count, width)
    )
    mask = (
        torch.ones((batch, length), dtype=torch.int64, device=text.device)
        if attention_mask is None
        else attention_mask.to(torch.int64)
    )
    mask = torch.where(in_span, 1, mask.gather(1, token.clamp(0, length - 1)))
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return PaddedInputs(embeds, mask, position_ids, torch.where(in_span, -1, token), count)


def compute_padded_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    inputs: PaddedInputs,
    items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy over supervised tokens, each predicted by the position before it.

    A text's first token and padding are never targets.

    Args:
        logits: [B, S + R, V].
        labels: [B, S], IGNORE where unsupervised.
        input_ids: [B, S].
        attention_mask: [B, S], 0 for padding.
        inputs: the batch as the LLM read it.
        items: what the sum is divided by; default: the number of supervised tokens.

    Returns:
        [] fp32; 0 where no token is supervised.
    """
    labels = labels.clone()
    labels.scatter_(1, find_text_starts(input_ids, attention_mask)[:, None], IGNORE)
    if attention_mask is not None:
        labels = labels.masked_fill(attention_mask == 0, IGNORE)
    aligned = labels.gather(1, inputs.text.clamp(min=0))
    targets = torch.where(inputs.text >= 0, aligned, IGNORE)[:, 1:]
    total = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="sum"
    )
    return total / ((targets != IGNORE).sum().clamp(min=1) if items is None else items)
