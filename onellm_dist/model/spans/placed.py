"""Padded batches with media anywhere in their texts: any number a row, at any places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.media_size import MOST_SPANS
from onellm_dist.common.placeholders import PlacedSpan
from onellm_dist.model.spans.padded import PaddedInputs


class RowSpan(NamedTuple):
    """One span of a row."""

    modality: str
    place: int
    """How many text tokens of its row stand before it (padding not counted)."""
    number: int = 0
    """Number of the span within its medium."""


def read_row_spans(spans: Sequence[Sequence[PlacedSpan]]) -> list[list[RowSpan]]:
    """Read `media_spans` of the model's forward.

    Raises:
        UsageError: a span is not (modality, place) or (modality, place, number).
    """
    try:
        rows = [[RowSpan(*span) for span in own] for own in spans]
    except TypeError:
        raise UsageError(
            f"media_spans={spans!r:.200}",
            "a span is (modality, place), or (modality, place, number) of a medium's later spans.",
            "give a list of these for each text.",
        ) from None
    wrong = [span for own in rows for span in own if not 0 <= span.number < MOST_SPANS]
    if wrong:
        raise UsageError(
            f"media_spans: a span of {wrong[0].modality} has the number {wrong[0].number}",
            f"a medium has at most {MOST_SPANS} spans.",
            "count the spans of each medium from 0.",
        )
    return rows


def check_placed_spans(
    spans: Sequence[Sequence[RowSpan]],
    values: Mapping[str, torch.Tensor],
    attention_mask: torch.Tensor | None,
    shape: tuple[int, int],
) -> None:
    """Check that the spans of a batch fit its texts and values.

    Args:
        spans: the spans of each row, in order.
        values: modality to [n_m, *value_shape].
        attention_mask: [B, S], 0 for padding.
        shape: B and S.

    Raises:
        UsageError: they do not.
    """
    lengths = [shape[1]] * shape[0] if attention_mask is None else attention_mask.sum(1).tolist()
    if len(spans) != shape[0]:
        raise UsageError(
            f"media_spans of {format_count(len(spans), 'row')} for "
            f"{format_count(shape[0], 'text')}",
            "every text needs a list of its spans, which may be empty.",
            "give one list for each text.",
        )
    for row, (own, length) in enumerate(zip(spans, lengths, strict=True)):
        places = [span.place for span in own]
        if places != sorted(places) or any(not 1 <= place <= length for place in places):
            raise UsageError(
                f"media_spans: row {row} has spans at {places} in a text of "
                f"{format_count(length, 'token')}",
                "a span stands behind one of the text's tokens, and the spans ascend.",
                "give places of 1 (behind BOS) to the number of tokens, in order.",
            )
    counts = Counter(span.modality for own in spans for span in own)
    wrong = [
        f"{format_count(counts[name], 'span')} and "
        f"{format_count(len(values[name]) if name in values else 0, 'value')} of {name}"
        for name in sorted({*counts, *values})
        if counts[name] != (len(values[name]) if name in values else 0)
    ]
    if wrong:
        raise UsageError(
            f"media_spans: {'; '.join(wrong)}",
            "texts would be shown with the wrong media.",
            "give one row of values for each span, in the order of rows and spans.",
        )


def list_span_rows(
    spans: Sequence[Sequence[RowSpan]],
    tokens: Mapping[str, torch.Tensor],
    tags: torch.Tensor,
    modalities: Sequence[str],
) -> list[torch.Tensor]:
    """Put together the spans of each text.

    Args:
        spans: the spans of each text, in order.
        tokens: modality to [n_m, Q, d].
        tags: [2 * modalities, d], start and end tag of each.
        modalities: the model's, in its order.

    Returns:
        For each text [32 r, d], its r spans end to end.
    """
    used: Counter[str] = Counter()
    rows = []
    for own in spans:
        pieces = [tags[:0]]
        for name, _, _ in own:
            first = 2 * modalities.index(name)
            own_tokens = tokens[name][used[name]].to(tags)
            pieces += [tags[first : first + 1], own_tokens, tags[first + 1 : first + 2]]
            used[name] += 1
        rows.append(torch.cat(pieces))
    return rows


def insert_placed_spans(
    text: torch.Tensor,
    attention_mask: torch.Tensor | None,
    spans: Sequence[Sequence[RowSpan]],
    rows: Sequence[torch.Tensor],
    starts: torch.Tensor,
) -> PaddedInputs:
    """Put spans into texts at their places; rows with fewer spans are padded on the left.

    Args:
        text: [B, S, d] text embeddings.
        attention_mask: [B, S], 0 for padding.
        spans: the spans of each row, in order.
        rows: for each row [r, d], its spans end to end, r a multiple of the positions of a span.
        starts: [B] position of each row's first token.
    """
    batch, length, width = text.shape
    longest = max((len(row) for row in rows), default=0)
    padded = text.new_zeros((batch, longest, width))
    gather = torch.zeros((batch, length + longest), dtype=torch.int64)
    token = torch.full((batch, length + longest), -1, dtype=torch.int64)
    for b, (placed, row) in enumerate(zip(spans, rows, strict=True)):
        padded[b, : len(row)] = row
        positions = len(row) // len(placed) if placed else 0
        source: list[int] = []
        done, start = 0, int(starts[b])
        for number, (_, place, _) in enumerate(placed):
            source += range(done, start + place)
            done = start + place
            source += range(length + positions * number, length + positions * (number + 1))
        source += range(done, length)
        at = torch.tensor(source)
        gather[b, longest - len(row) :] = at
        token[b, longest - len(row) :] = torch.where(at < length, at, -1)
    gather, token = gather.to(text.device), token.to(text.device)
    embeds = torch.cat([text, padded], 1).gather(
        1, gather[..., None].expand(batch, length + longest, width)
    )
    real = (
        torch.ones((batch, length), dtype=torch.int64, device=text.device)
        if attention_mask is None
        else attention_mask.to(torch.int64)
    )
    own = real.gather(1, token.clamp(min=0))
    mask = torch.where(token < 0, (gather >= length).to(torch.int64), own)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return PaddedInputs(embeds, mask, position_ids, token, longest)
