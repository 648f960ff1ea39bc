"""Conversations in the LLM's own chat template, with the characters of every answer, exactly.

Where the template marks answers (`{% generation %}`), its marks are taken. Where it does not, the conversation is rendered up to
each answer, without it (as generation would be asked) and with it: what is added is the answer and its end. A template of which
that is not true (one that rewrites earlier turns, or writes something between prompt and answer) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from onellm_dist.common.errors import SampleError, UsageError

Message = dict[str, str]
Spans = list[tuple[int, int]]

ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}
"""Our speakers -> the roles of chat templates."""
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: tuple[tuple[str, str], ...] = (
    ("Human", "first question"),
    ("Assistant", "an answer"),
    ("Human", "next one"),
    ("Assistant", "more"),
)


class ChatTemplate:
    """The chat template of a tokenizer. Picklable.

    Args:
        tokenizer: a transformers tokenizer with a `chat_template`.

    Raises:
        UsageError: it has none, or answers cannot be told from what the template writes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise UsageError(
                f"data.text_format=chat: the tokenizer ({type(tokenizer).__name__}) has no chat template",
                "the LLM's own layout of a conversation is not known.",
                "save a chat_template.jinja beside the model, or use data.text_format=conversation.",
            )
        self.source: str = tokenizer.get_chat_template()
        """The template's text."""
        self._marked = _MARK.search(self.source) is not None
        self._control = [
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        try:
            text, _ = self.render(_PROBE)
            first = self._text(_messages(_PROBE[:2]))
        except SampleError as error:
            raise UsageError(
                f"data.text_format=chat: the chat template of the tokenizer cannot be supervised exactly: {error.what}",
                "words that are no answer would be trained on, or answers left out.",
                "mark the answers in the template with {% generation %} ... {% endgeneration %}, or use data.text_format=conversation.",
            ) from None
        bos = tokenizer.bos_token
        self.has_bos = bool(bos) and text.startswith(bos) and first.count(bos) == 1
        """The text begins with BOS, once for the whole of it (in ChatML, the BOS of some tokenizers opens every turn)."""

    def render(self, turns: Sequence[tuple[str, str]]) -> tuple[str, Spans]:
        """The text of a conversation of (speaker, value) turns, and for each answer its characters [start, end).

        Raises:
            SampleError: the template refuses the conversation, an answer's place in it is not certain, or a turn holds a control token.
        """
        held = [token for _, value in turns for token in self._control if token in value]
        if held:
            raise SampleError(
                f"a turn of its conversation holds the control token {held[0]!r}",
                "in the chat template it would begin or end a turn.",
                "take it out of the text, or leave the sample out.",
            )
        messages = _messages(turns)
        return self._marks(messages) if self._marked else self._increments(messages)

    def prompt(self, turns: Sequence[tuple[str, str]]) -> str:
        """The text after which the next answer is generated.

        Raises:
            SampleError: the template refuses the turns.
        """
        return self._text(_messages(turns), prompt=True)

    def _marks(self, messages: list[Message]) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template  # imports torch

        options = {
            "chat_template": self.source,
            "return_assistant_tokens_mask": True,
            **self._tokenizer.special_tokens_map,
        }
        try:
            rendered: Any = render_jinja_template(
                [messages], **options
            )  # annotated as a string; with the mask it is a pair of lists
        except TemplateError as error:
            raise _refused(error) from None
        (text,), (spans,) = rendered
        if text != self._text(messages):
            raise SampleError(
                "its chat template gives another text with its marks",
                "labels would be misplaced.",
                "mend the template.",
            )
        found = [(start, end) for start, end in spans if end > start]
        if not found:
            raise SampleError(
                "the chat template marks no answer",
                "nothing would be supervised.",
                "mend the template.",
            )
        return text, found

    def _increments(self, messages: list[Message]) -> tuple[str, Spans]:
        text, spans = self._text(messages), []
        for k, message in enumerate(messages):
            if message["role"] != ROLES["Assistant"]:
                continue
            asked, answered = self._text(messages[:k], prompt=True), self._text(messages[: k + 1])
            if not (text.startswith(answered) and answered.startswith(asked)):
                raise _uncertain(
                    f"its chat template writes the turns before turn {k} in another way once that is there"
                )
            said, answer = answered[len(asked) :], message["content"].strip()
            if not said.lstrip().startswith(answer):
                raise _uncertain(
                    f"between the prompt and the answer in turn {k} its chat template writes {_begin(said, answer)!r}"
                )
            if not said.lstrip()[len(answer) :].strip():
                raise _uncertain(
                    f"its chat template writes nothing behind the answer in turn {k}, so that no end could be learnt"
                )
            bare = said.rstrip()
            ends = any(
                bare.endswith(token) for token in self._control
            )  # what follows the end of a turn is never generated
            spans.append((len(asked), len(asked) + len(bare if ends else said)))
        return text, spans

    def _text(self, messages: list[Message], *, prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, IndexError) as error:  # a template may look at messages[0]
            raise _refused(error) from None
        return text


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": ROLES[speaker], "content": value} for speaker, value in turns]


def _begin(said: str, answer: str) -> str:
    at = said.find(answer)
    return said[: at if at > 0 else 40]


def _refused(error: Exception) -> SampleError:
    return SampleError(
        f"its chat template refuses the conversation: {error}",
        "it has no text.",
        "mend the turns, or leave the sample out.",
    )


def _uncertain(what: str) -> SampleError:
    return SampleError(
        what,
        "answers cannot be told from the rest.",
        "mark them with {% generation %} in the template.",
    )
