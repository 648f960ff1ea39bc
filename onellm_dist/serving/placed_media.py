"""Prompts with several media, or with placeholders where media stand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onellm_dist.common.placeholders import PlacedSpan, list_medium_spans, mark_placeholders
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.media_text import MediaText, MediaTextEncoder
from onellm_dist.data.text import TextEncoder
from onellm_dist.modalities import Part, all_modalities

if TYPE_CHECKING:
    import torch

MediaInputs = Sequence[tuple[str, "torch.Tensor"]]
"""Modality and [spans, *value_shape] of each medium, in order."""


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt as the model's `generate` takes it."""

    ids: list[int]
    """The text, BOS first."""
    spans: list[PlacedSpan]
    """The spans, as the model's `forward` takes them."""
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    """Modality to [n_m, *value_shape], in the order of the spans."""


def needs_places(text: str, media: Sequence[str], spans: Sequence[int]) -> bool:
    """Whether a prompt is more than one span of each modality behind BOS.

    Args:
        text: the prompt.
        media: modality of each medium.
        spans: how many spans each takes.
    """
    if len(set(media)) < len(media) or any(number > 1 for number in spans):
        return True
    return bool(media) and mark_placeholders(text, all_modalities()) != text


def place_prompt(
    tokenizer: Any,
    text: str,
    media: MediaInputs,
    modalities: Sequence[str],
    *,
    chat: bool,
    order: Sequence[str] | None = None,
) -> PlacedPrompt:
    """Encode a prompt exactly as training encodes the text of a sample that lists its media.

    Args:
        tokenizer: the model's fast tokenizer.
        text: the prompt, as `generate.build_prompt` returns it.
        media: its media.
        modalities: the model's, whose placeholders count.
        chat: whether `text` is a question to put into the LLM's chat template.
        order: order of the modalities without placeholders; default: the model's own.

    Raises:
        SampleError: the placeholders do not fit the media.
    """
    import torch

    base = TextEncoder(tokenizer, "chat" if chat else "caption", sys.maxsize)
    encoder = MediaTextEncoder(base, modalities, order=order)
    names = [name for name, _ in media]
    if chat:
        found = encoder.encode_media_prompt([ConversationTurn("user", text)], names)
    else:
        encoded = encoder.encode_media({"txt": Part("txt", text.encode("utf-8"))}, names)
        found = MediaText(encoded.ids[:-1], encoded.labels[:-1], encoded.media)  # without EOS
    spans: list[PlacedSpan] = []
    rows: dict[str, list[torch.Tensor]] = {}
    for number, place in found.media:
        name, values = media[number]
        spans += list_medium_spans(name, place, len(values))
        rows.setdefault(name, []).append(values)
    return PlacedPrompt(found.ids, spans, {name: torch.cat(own) for name, own in rows.items()})
