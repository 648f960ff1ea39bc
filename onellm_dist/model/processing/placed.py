"""Conversations with media inside their turns, as the token ids and spans that training reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature

from onellm_dist.common.errors import UsageError
from onellm_dist.common.placeholders import (
    PlacedSpan,
    add_marks,
    list_medium_spans,
    place_media,
    take_out_marks,
)
from onellm_dist.modalities import all_modalities
from onellm_dist.model.processing.chat import encode_conversation
from onellm_dist.model.processing.content_parts import Conversation
from onellm_dist.model.processing.media import read_medium_spans
from onellm_dist.model.processing.rows import Padding, make_features


class PlacedConversation(NamedTuple):
    """A conversation without marks, and its spans."""

    ids: list[int]
    mask: list[int]
    """1 for each token that training supervises."""
    spans: list[PlacedSpan]
    """The spans, as the model's `forward` takes them."""
    values: list[tuple[str, torch.Tensor]]
    """Modality and [spans, *value_shape] of each medium, in the order of the sequence."""


def needs_placing(conversation: Conversation, most: Mapping[str, int]) -> bool:
    """Whether a conversation's media stand in its turns; else they stand behind BOS.

    That follows from the conversation and the model alone, never from the rest of a batch.

    Args:
        conversation: the conversation.
        most: `data.spans` of the model's training.
    """
    names = [medium.modality for medium in conversation.media]
    return len(set(names)) < len(names) or (bool(most) and bool(names))


def needs_spans(found: Sequence[Conversation], most: Mapping[str, int]) -> bool:
    """Whether media behind BOS differ from row to row, or may take several spans."""
    names = [{medium.modality for medium in each.media} for each in found]
    return any(n != names[0] for n in names) or any(n & most.keys() for n in names)


def encode_prompt_media(
    ids: list[int],
    media: Sequence[tuple[str, Any]],
    most: Mapping[str, int],
    rate: float | None,
) -> PlacedConversation:
    """Put the media of a prompt behind its BOS.

    Args:
        ids: BOS and the prompt.
        media: modality and medium, one of each modality.
        most: `data.spans` of the model's training.
        rate: samples per second of sounds that are given as arrays.

    Raises:
        SampleError: a medium cannot be read.
    """
    names = [name for name, _ in media]
    spans: list[PlacedSpan] = []
    values = []
    for number, place in place_media([], names, list(all_modalities())):
        name, item = media[number]
        own = read_medium_spans(name, item, most.get(name, 1), rate)
        spans += list_medium_spans(name, place, len(own))
        values.append((name, own))
    return PlacedConversation(ids, [0] * len(ids), spans, values)


def encode_placed(
    tokenizer: Any, conversation: Conversation, most: Mapping[str, int], *, prompt: bool
) -> PlacedConversation:
    """Encode a conversation whose turns have a mark for each of its media.

    Args:
        tokenizer: a fast transformers tokenizer.
        conversation: as `read_conversation(..., marks=True)` gives it.
        most: `data.spans` of the model's training.
        prompt: whether the text ends where an answer would begin.

    Raises:
        UsageError: the tokenizer has no chat template that can be used.
        SampleError: the template refuses the turns, or a medium cannot be read.
    """
    names = list(all_modalities())
    media = [medium.modality for medium in conversation.media]
    backend, marks = add_marks(tokenizer.backend_tokenizer, names)
    backend.encode_special_tokens = False
    ids, mask = encode_conversation(tokenizer, conversation.turns, prompt=prompt, backend=backend)
    text, kept, found = take_out_marks(ids, mask, marks)
    spans: list[PlacedSpan] = []
    values = []
    for number, place in place_media(found, media, names):
        medium = conversation.media[number]
        share = most.get(medium.modality, 1) // media.count(medium.modality)
        own = read_medium_spans(medium.modality, medium.item, share)
        spans += list_medium_spans(medium.modality, place, len(own))
        values.append((medium.modality, own))
    return PlacedConversation(text, kept, spans, values)


def make_placed_features(
    tokenizer: Any, rows: Sequence[PlacedConversation], shape: Padding, *, with_masks: bool
) -> BatchFeature:
    """Inputs of the model, `media_spans` among them.

    Args:
        tokenizer: a transformers tokenizer.
        rows: the conversations.
        shape: how rows are padded.
        with_masks: whether to add `assistant_masks`.

    Raises:
        UsageError: rows would be cut.
    """
    if shape.truncation:
        raise UsageError(
            f"truncation={shape.truncation} with media inside the text",
            "a cut would lose media.",
            "leave it out, or shorten the conversation.",
        )
    values: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        for name, own in row.values:
            values.setdefault(f"{name}_values", []).append(own)
    joined = {key: torch.cat(own) for key, own in values.items()}
    masks = [row.mask for row in rows] if with_masks else None
    data = make_features(tokenizer, [row.ids for row in rows], joined, shape, masks)
    data["media_spans"] = [row.spans for row in rows]
    return data
