"""From the messages of a request to what the model continues."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.text import (
    STOP,
    TextEncoder,
    render_answer_prefix,
    render_opening,
    render_turn,
)
from onellm_dist.modalities import Part


@dataclass(frozen=True)
class ServedFormat:
    """How messages become text: one of `chat`, `conversation` and `raw`.

    Attributes:
        name: the format.
        tokenizer: the tokenizer of the LLM.
        plain: encodes the other formats.
        chat: encodes the LLM's chat template; in `chat` alone.
    """

    name: str
    tokenizer: Any
    plain: TextEncoder
    chat: TextEncoder | None = None

    @classmethod
    def choose(cls, name: str, tokenizer: Any) -> ServedFormat:
        """Choose the format; `auto` is `chat` where the tokenizer has a chat template.

        Raises:
            UsageError: the tokenizer has no chat template that can be used.
        """
        if name == "auto":
            name = "chat" if tokenizer.chat_template else "conversation"
        encoder = TextEncoder(tokenizer, "chat", sys.maxsize) if name == "chat" else None
        return cls(name, tokenizer, TextEncoder(tokenizer, "caption", sys.maxsize), encoder)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return self.chat.end_ids if self.chat else [self.tokenizer.eos_token_id]

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        end = self.chat.end_text if self.chat else STOP
        return (end,) if end else ()

    def encode(self, turns: Sequence[ConversationTurn]) -> list[int]:
        """Ids of BOS and the text up to the answer.

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
        if self.chat:
            return self.chat.encode_prompt(turns)
        if self.name == "raw":
            if len(turns) > 1:
                raise UsageError(
                    f"{len(turns)} messages",
                    "this model continues one text (--format raw).",
                    "send one message of role user.",
                )
            text = turns[0].text
        else:
            opening, rest = render_opening(turns)
            text = opening + "".join(map(render_turn, rest)) + render_answer_prefix()
        ids, _ = self.plain.encode({"txt": Part("txt", text.encode("utf-8"))})
        return ids[:-1]  # without the caption's EOS
