"""The text of a preference sample: the conversation as chosen, then as rejected (for DPO).

Both are whole texts, each beginning with BOS, and stand end to end in the pack of their sample: a
pair is never split. Answers alone are supervised, and only those that the two do not
share. The media of the prompt stand at the same places in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from onellm_dist.common.errors import SampleError
from onellm_dist.common.placeholders import PlacedMedium
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.media_text import MediaText, MediaTextEncoder
from onellm_dist.data.text import TextEncoder
from onellm_dist.data.text_parts import read_pair
from onellm_dist.modalities.base import Part
from onellm_dist.packed import IGNORE


class PairText(NamedTuple):
    """Both texts of a preference sample, end to end."""

    ids: list[int]
    labels: list[int]
    chosen_tokens: int
    """Tokens of the text with the chosen answer, which stands first."""
    media: list[PlacedMedium]
    """The media of each of the texts, in the order of the sequence."""


def encode_pair(
    encoder: TextEncoder, parts: Mapping[str, Part], media: Sequence[str] | None
) -> PairText:
    """Encode a preference sample; each text is cut to the encoder's maximum length.

    Args:
        encoder: a MediaTextEncoder, where the dataset lists its media.
        parts: the sample's text parts by extension.
        media: the modality of each medium, where the dataset lists them; None: all media stand
            behind BOS, and the list of places is empty.

    Raises:
        SampleError: the sample is not a pair, an answer is cut away, both texts are the same, or
            media do not stand at the same places in both.
    """
    chosen, rejected = (
        _encode_one(encoder, turns, media)
        for turns in read_pair(parts, placeholders=media is not None)
    )
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if all(label == IGNORE for label in text.labels):
            raise SampleError(
                f"nothing is left of its {name} answer within {encoder.max_tokens} tokens",
                "two answers are compared, so both must be read.",
                "raise data.max_text_tokens, or leave the sample out.",
            )
    if chosen.ids == rejected.ids:
        raise SampleError(
            f"its chosen and its rejected answer are the same within {encoder.max_tokens} tokens",
            "such a pair teaches nothing.",
            "raise data.max_text_tokens, or leave the sample out.",
        )
    if chosen.media != rejected.media:
        raise SampleError(
            "its media do not stand at the same places in both answers",
            "the two answers are about the same media, which are read once.",
            "put placeholders into the turns that both answers share.",
        )
    return PairText(
        chosen.ids + rejected.ids, chosen.labels + rejected.labels, len(chosen.ids), chosen.media
    )


def encode_texts(
    encoder: TextEncoder, parts: Mapping[str, Part], media: Sequence[str] | None
) -> list[tuple[list[int], list[int]]]:
    """Encode every text that a sample may be read with, of a pair both as one: ids and labels.

    Args:
        encoder: a MediaTextEncoder, where the dataset lists its media.
        parts: the sample's text parts by extension.
        media: the modality of each medium, where the dataset lists them.

    Raises:
        SampleError: as of `TextEncoder.encode`, or `encode_pair`.
    """
    if encoder.pairs:
        pair = encode_pair(encoder, parts, media)
        return [(pair.ids, pair.labels)]
    if media is None:
        return encoder.encode_all(parts)
    assert isinstance(encoder, MediaTextEncoder)
    return encoder.encode_all_media(parts, media)


def _encode_one(
    encoder: TextEncoder, turns: Sequence[ConversationTurn], media: Sequence[str] | None
) -> MediaText:
    if media is None:
        return MediaText(*encoder.encode_turns(turns), [])
    assert isinstance(encoder, MediaTextEncoder)
    return encoder.encode_media_turns(turns, media)
