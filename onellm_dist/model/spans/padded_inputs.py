"""From texts and values to a padded batch of embeddings, with the media spans in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onellm_dist.common.placeholders import PlacedSpan
from onellm_dist.model.llm.token_ids import count_embeddings, replace_padding
from onellm_dist.model.spans.padded import (
    PaddedInputs,
    check_values,
    find_text_starts,
    get_span_order,
    insert_spans,
)
from onellm_dist.model.spans.placed import (
    check_placed_spans,
    insert_placed_spans,
    list_span_rows,
    read_row_spans,
)
from onellm_dist.model.spans.positions import list_span_numbers


def build_padded_inputs(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    values: Mapping[str, Any],
    modality_order: Sequence[str] | None,
    media_spans: Sequence[Sequence[PlacedSpan]] | None,
) -> PaddedInputs:
    """Do what `OneLLMForConditionalGeneration.build_inputs` says.

    Args:
        model: the model.
        input_ids: as there.
        attention_mask: as there.
        values: as there.
        modality_order: as there.
        media_spans: as there.
    """
    batch = len(input_ids)
    known = model.config.modalities
    by_name = check_values(values, known, batch if media_spans is None else None)
    placed = None if media_spans is None else read_row_spans(media_spans)
    numbers = None
    if placed is not None:
        check_placed_spans(placed, by_name, attention_mask, (batch, input_ids.shape[1]))
        order: list[str] = []
        numbers = list_span_numbers(
            [[span.modality for span in own] for own in placed],
            [[span.number for span in own] for own in placed],
        )
    else:
        order = get_span_order(by_name, known, modality_order)
    tokens, _ = model.encode(by_name, numbers)
    embedding = model.llm.get_input_embeddings()
    text = embedding(replace_padding(input_ids, attention_mask, count_embeddings(embedding)))
    tags = model.get_tags().to(text)
    starts = find_text_starts(input_ids, attention_mask)
    if placed is not None:
        rows = list_span_rows(placed, tokens, tags, known)
        return insert_placed_spans(text, attention_mask, placed, rows, starts)
    spans = [text[:, :0]]
    for name in order:
        start = 2 * known.index(name)
        spans += [
            tags[start].expand(batch, 1, -1),
            tokens[name].to(text),
            tags[start + 1].expand(batch, 1, -1),
        ]
    return insert_spans(text, attention_mask, torch.cat(spans, 1), starts)
