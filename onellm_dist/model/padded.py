"""Padded batches: runs put in after each text's first token, and the loss over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from onellm_dist.packed import IGNORE


@dataclass(frozen=True)
class Spliced:
    """A padded batch as the LLM reads it (R positions of runs put in).

    Attributes:
        embeds: [B, S + R, d].
        mask: [B, S + R] int64, 1 for real positions.
        position_ids: [B, S + R]; real positions count 0, 1, ...
        text: [B, S + R] the text token at each position, -1 in a run.
        runs: R.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    text: torch.Tensor
    runs: int


def prompt_starts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[B] index of each text's first unmasked token."""
    if attention_mask is None:
        return input_ids.new_zeros(len(input_ids))
    return attention_mask.to(torch.int64).argmax(1)


def splice(
    text: torch.Tensor,
    attention_mask: torch.Tensor | None,
    runs: torch.Tensor,
    starts: torch.Tensor,
) -> Spliced:
    """Put `runs` [B, R, d] into `text` [B, S, d] after position `starts` [B] of each row."""
    batch, length, width = text.shape
    count = runs.shape[1]
    at = torch.arange(length + count, device=text.device).expand(batch, length + count)
    start = starts[:, None]
    in_run = (at > start) & (at <= start + count)
    token = torch.where(at <= start, at, at - count)
    source = torch.where(in_run, length + at - start - 1, token)
    embeds = torch.cat([text, runs], 1).gather(
        1, source[..., None].expand(batch, length + count, width)
    )
    mask = (
        torch.ones((batch, length), dtype=torch.int64, device=text.device)
        if attention_mask is None
        else attention_mask.to(torch.int64)
    )
    mask = torch.where(in_run, 1, mask.gather(1, token.clamp(0, length - 1)))
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return Spliced(embeds, mask, position_ids, torch.where(in_run, -1, token), count)


def shifted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    spliced: Spliced,
) -> torch.Tensor:
    """Mean cross-entropy over supervised tokens, each predicted by the LLM position before it; 0 where there are none.

    A text's first token and padding are never targets. logits [B, S + R, V], labels [B, S].
    """
    labels = labels.clone()
    labels.scatter_(1, prompt_starts(input_ids, attention_mask)[:, None], IGNORE)
    if attention_mask is not None:
        labels = labels.masked_fill(attention_mask == 0, IGNORE)
    targets = torch.where(spliced.text >= 0, labels.gather(1, spliced.text.clamp(min=0)), IGNORE)[
        :, 1:
    ]
    total = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="sum"
    )
    return total / (targets != IGNORE).sum().clamp(min=1)
