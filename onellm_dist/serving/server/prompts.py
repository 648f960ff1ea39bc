"""From the messages of a request to what the model continues."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.placeholders import place_media
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.media_text import MediaText, MediaTextEncoder
from onellm_dist.data.text import (
    STOP,
    TextEncoder,
    render_answer_prefix,
    render_opening,
    render_turn,
)
from onellm_dist.modalities import all_modalities


@dataclass(frozen=True)
class ServedFormat:
    """How messages become text: one of `chat`, `conversation` and `raw`.

    Attributes:
        name: the format.
        tokenizer: the tokenizer of the LLM.
        encoder: encodes the LLM's chat template in `chat`, else plain texts.
    """

    name: str
    tokenizer: Any
    encoder: MediaTextEncoder

    @classmethod
    def choose(cls, name: str, tokenizer: Any) -> ServedFormat:
        """Choose the format; `auto` is `chat` where the tokenizer has a chat template.

        Raises:
            UsageError: the tokenizer has no chat template that can be used.
        """
        if name == "auto":
            name = "chat" if tokenizer.chat_template else "conversation"
        base = TextEncoder(tokenizer, "chat" if name == "chat" else "caption", sys.maxsize)
        return cls(name, tokenizer, MediaTextEncoder(base, list(all_modalities())))

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return self.encoder.end_ids if self.name == "chat" else [self.tokenizer.eos_token_id]

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        end = self.encoder.end_text if self.name == "chat" else STOP
        return (end,) if end else ()

    def encode(
        self, turns: Sequence[ConversationTurn], media: Sequence[str] = (), *, placed: bool = False
    ) -> MediaText:
        """Encode BOS and the text up to the answer, and say where media stand in it.

        Args:
            turns: the conversation.
            media: the modality of each medium.
            placed: whether the turns have a mark for each medium (`placeholders.make_mark`); else
                media stand behind BOS, in the order of the modalities.

        Raises:
            UsageError: the format has no text for these turns.
            SampleError: a turn contains a control token, or the template refuses the turns.
        """
        if turns[-1].role != "user":
            raise UsageError(
                f"the last message is of role {turns[-1].role}",
                "there is no question to answer.",
                "end with a message of role user.",
            )
        marked = media if placed else ()
        found = self.encoder.encode_marked(self._render(turns), marked)
        if placed:
            return found
        return found._replace(media=place_media([], media, list(all_modalities())))

    def _render(self, turns: Sequence[ConversationTurn]) -> str | Sequence[ConversationTurn]:
        """A text, or the turns where the LLM's template renders them."""
        if self.name == "chat":
            return turns
        if self.name == "raw":
            if len(turns) > 1:
                raise UsageError(
                    format_count(len(turns), "message"),
                    "this model continues one text (--format raw).",
                    "send one message of role user.",
                )
            return turns[0].text
        opening, rest = render_opening(turns)
        return opening + "".join(map(render_turn, rest)) + render_answer_prefix()
