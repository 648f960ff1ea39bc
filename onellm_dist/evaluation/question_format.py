"""From a question in words to the ids that the model continues, and back to an answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.text import (
    HEADER,
    STOP,
    TextEncoder,
    render_answer_prefix,
    render_turn,
)
from onellm_dist.modalities import Part
from onellm_dist.model.generation.batched import TextStop

FORMATS = ("conversation", "chat", "raw")


class QuestionFormat:
    """One of FORMATS with a tokenizer.

    `conversation` is the reference's instruction format, `chat` the LLM's own template, `raw` BOS
    and the prompt as it is.

    Args:
        tokenizer: the model's tokenizer.
        name: one of FORMATS.

    Raises:
        UsageError: there is no such format, or the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if name not in FORMATS:
            raise UsageError(
                f"--format {name}",
                "there is no such prompt format.",
                f"use one of: {', '.join(FORMATS)}.",
            )
        self._tokenizer = tokenizer
        self._chat = name == "chat"
        self._raw = name == "raw"
        self._encoder = TextEncoder(tokenizer, "chat" if self._chat else "caption", sys.maxsize)
        self._stop_text = (self._encoder.end_text if self._chat else STOP) or ""
        self.end_ids: list[int] = (
            list(self._encoder.end_ids) if self._chat else [int(tokenizer.eos_token_id)]
        )
        """Tokens that end an answer."""
        self.stop = TextStop(tokenizer, self._stop_text) if self._stop_text else None
        """Whether an answer ends with its last token."""

    def encode(self, prompt: str) -> tuple[str, list[int]]:
        """Return the text that the model reads, and its ids, BOS first."""
        turn = ConversationTurn("user", prompt)
        if self._chat:
            ids = list(self._encoder.encode_prompt([turn]))
            return self._tokenizer.decode(ids), ids
        text = prompt if self._raw else HEADER + render_turn(turn) + render_answer_prefix()
        ids, _ = self._encoder.encode({"txt": Part("txt", text.encode("utf-8"))})
        return text, ids[:-1]  # without the caption's EOS

    def decode(self, tokens: Sequence[int]) -> str:
        """Return an answer without special tokens, cut at the stop string."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return (text.split(self._stop_text, maxsplit=1)[0] if self._stop_text else text).strip()
