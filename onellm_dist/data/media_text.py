"""Texts of samples that list their media: placeholders are taken out, and say where spans stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from onellm_dist.common.placeholders import (
    PlacedMedium,
    add_marks,
    mark_placeholders,
    place_media,
    take_out_marks,
)
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.text import TextEncoder
from onellm_dist.data.text_parts import read_turns
from onellm_dist.modalities import all_modalities
from onellm_dist.modalities.base import Part
from onellm_dist.shards.format.dataset import Dataset


class MediaText(NamedTuple):
    """A text without its placeholders, and where its media stand."""

    ids: list[int]
    labels: list[int]
    media: list[PlacedMedium]
    """The media in the order of the sequence."""


class MediaTextEncoder(TextEncoder):
    """Encodes texts whose placeholders say where media stand. It can be pickled.

    Args:
        base: tokenizer, text format and maximum length. Placeholders do not count as tokens. A
            medium behind the cut of a text that is too long stands at its end, so that costs are
            known without the text.
        modalities: those whose placeholders count; those of others are text.
        order: order of the media behind BOS, as modalities; default: the paper's.
    """

    def __init__(
        self, base: TextEncoder, modalities: Sequence[str], *, order: Sequence[str] | None = None
    ) -> None:
        vars(self).update(vars(base))
        self._media = tuple(modalities)
        self._backend, self._mark_ids = add_marks(base._backend, self._media)
        self._order = (*(order or ()), *(m for m in all_modalities() if m not in (order or ())))

    def encode_media(
        self,
        parts: Mapping[str, Part],
        media: Sequence[str],
        choose: Callable[[int], int] | None = None,
    ) -> MediaText:
        """Encode a sample's text; as `encode`.

        Args:
            parts: the sample's text parts by extension.
            media: the modality of each of its media.
            choose: as of `encode`.

        Raises:
            SampleError: as of `encode`, or the placeholders do not fit the media.
        """
        return self._take_out(*self.encode(parts, choose), media)

    def encode_all_media(
        self, parts: Mapping[str, Part], media: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Encode every text the sample may be read with, as `encode_all`, without placeholders.

        Raises:
            SampleError: as of `encode_media`.
        """
        found = [self._take_out(*text, media) for text in self.encode_all(parts)]
        return [(text.ids, text.labels) for text in found]

    def encode_media_turns(
        self, turns: Sequence[ConversationTurn], media: Sequence[str]
    ) -> MediaText:
        """Encode a conversation whose placeholders are still text; as `encode_media`.

        Raises:
            SampleError: as of `encode_media`.
        """
        return self._take_out(*self.encode_turns([self._mark(turn) for turn in turns]), media)

    def encode_media_prompt(
        self, turns: Sequence[ConversationTurn], media: Sequence[str]
    ) -> MediaText:
        """Encode what comes before the next answer, as `encode_prompt` (format `chat` only).

        Raises:
            SampleError: as of `encode_prompt`, or the placeholders do not fit the media.
        """
        ids = self.encode_prompt([self._mark(turn) for turn in turns])
        return self._take_out(ids, ids, media)

    def encode_marked(
        self, text: str | Sequence[ConversationTurn], media: Sequence[str]
    ) -> MediaText:
        """Encode what comes before an answer, where a mark stands for each medium already.

        Unlike a placeholder, a mark cannot be meant as words (`placeholders.make_mark`).

        Args:
            text: a text as of the format `caption`; the turns of a conversation in `chat`.
            media: the modality of each medium.

        Raises:
            SampleError: as of `encode_prompt`.
        """
        if isinstance(text, str):
            ids, _ = super()._encode_caption(text)
            ids = ids[:-1]  # without the caption's EOS
        else:
            ids = self.encode_prompt(text)
        return self._take_out(ids, ids, media)

    def _mark(self, turn: ConversationTurn) -> ConversationTurn:
        return turn._replace(text=mark_placeholders(turn.text, self._media))

    def _read_turns(self, parts: Mapping[str, Part]) -> Sequence[ConversationTurn]:
        return [self._mark(turn) for turn in read_turns(parts, placeholders=True)]

    def _encode_caption(self, caption: str) -> tuple[list[int], list[int]]:
        return super()._encode_caption(mark_placeholders(caption, self._media))

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        return ids, labels  # marks do not count: `_take_out` cuts

    def _take_out(
        self, ids: Sequence[int], labels: Sequence[int], media: Sequence[str]
    ) -> MediaText:
        text, targets, found = take_out_marks(ids, labels, self._mark_ids)
        kept = [(name, min(place, self.max_tokens)) for name, place in found]
        placed = place_media(kept, media, self._order)
        return MediaText(text[: self.max_tokens], targets[: self.max_tokens], placed)


def get_media_encoder(base: TextEncoder, dataset: Dataset) -> MediaTextEncoder | None:
    """Return the encoder of a dataset that lists its media; None: it does not list them.

    It is made once for each set of modalities.
    """
    if not dataset.lists_media:
        return None
    known = base.media_encoders.get(dataset.modalities)
    if not isinstance(known, MediaTextEncoder):
        known = base.media_encoders[dataset.modalities] = MediaTextEncoder(base, dataset.modalities)
    return known
