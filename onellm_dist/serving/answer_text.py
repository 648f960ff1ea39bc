"""The text of an answer while its tokens come: what can be shown of it, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
"""What a tokenizer makes of the first bytes of a character whose others are still to come."""


class AnswerText:
    """Decodes an answer token by token.

    Leading and trailing blanks are left out. A text that may be the beginning of a stop string, or
    of a character, is held back until it is known what follows.

    Args:
        tokenizer: the tokenizer of the LLM.
        stops: strings at which the answer ends; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._decoded = ""
        self._shown = 0
        self.stopped = False
        """Whether a stop string came."""

    def add(self, token: int) -> str:
        """Add a token; returns the text that can be shown now, and was not yet."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        # All of it: what a token reads as may depend on the tokens before it.
        self._decoded = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        found = [at for stop in self._stops if (at := self._decoded.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]
            return self.finish()
        return self._show(len(self._decoded) - self._count_held())

    def finish(self) -> str:
        """End the answer; returns the text that was held back."""
        return self._show(len(self._decoded.rstrip()))

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._decoded.strip()

    def _count_held(self) -> int:
        """Characters at the end that are not shown yet."""
        known = self._decoded.rstrip(_UNFINISHED)
        prefixes = [stop[:length] for stop in self._stops for length in range(1, len(stop))]
        beginning = max((p for p in prefixes if known.endswith(p)), key=len, default="")
        shown = known[: len(known) - len(beginning)].rstrip()
        return len(self._decoded) - len(shown)

    def _show(self, end: int) -> str:
        start = max(self._shown, len(self._decoded) - len(self._decoded.lstrip()))
        if end <= start:
            return ""
        self._shown = end
        return self._decoded[start:end]
