"""Conversations in the LLM's own chat template, with the exact characters of every answer.

If the template marks answers (`{% generation %}`), its marks are used. Otherwise the conversation
is rendered up to each answer, once without it (the prompt for generation) and once with it: what
is added is the answer and its end. A template for which this does not hold is refused, for example
one that rewrites earlier turns or writes something between prompt and answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.turns import ConversationTurn

Message = dict[str, str]
CharacterSpans = list[tuple[int, int]]

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EXAMPLE = (
    ConversationTurn("user", "first question"),
    ConversationTurn("assistant", "an answer"),
    ConversationTurn("user", "next one"),
    ConversationTurn("assistant", "more"),
)


class ChatTemplate:
    """The chat template of a tokenizer. It can be pickled.

    Args:
        tokenizer: a transformers tokenizer with a `chat_template`.

    Raises:
        UsageError: there is no template, or answers cannot be separated from the rest.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise UsageError(
                f"data.text_format=chat: the tokenizer ({type(tokenizer).__name__}) has no chat "
                "template",
                "the LLM's own layout of a conversation is unknown.",
                "save a chat_template.jinja beside the model, or use "
                "data.text_format=conversation.",
            )
        self.source: str = tokenizer.get_chat_template()
        """The template's text."""
        self._marked = _MARK.search(self.source) is not None
        self._control_tokens = [
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        try:
            text, _ = self.render(_EXAMPLE)
            first = self._apply(_to_messages(_EXAMPLE[:2]))
        except SampleError as error:
            raise UsageError(
                "data.text_format=chat: the tokenizer's chat template cannot be supervised "
                f"exactly: {error.what}",
                "words outside an answer would be trained on, or answers left out.",
                "mark the answers in the template with {% generation %} ... {% endgeneration %}, "
                "or use data.text_format=conversation.",
            ) from None
        bos = tokenizer.bos_token
        self.has_bos = bool(bos) and text.startswith(bos) and first.count(bos) == 1
        """Whether the text begins with BOS, once for all turns (in ChatML, the BOS of some
        tokenizers opens every turn)."""

    def render(self, turns: Sequence[ConversationTurn]) -> tuple[str, CharacterSpans]:
        """Render a conversation.

        Returns:
            The text, and for each answer its characters [start, end), its end included.

        Raises:
            SampleError: the template refuses the conversation, an answer's position is uncertain,
                or a turn contains a control token.
        """
        found = [token for turn in turns for token in self._control_tokens if token in turn.text]
        if found:
            raise SampleError(
                f"a turn of its conversation contains the control token {found[0]!r}",
                "in the chat template it would begin or end a turn.",
                "remove it from the text, or leave the sample out.",
            )
        messages = _to_messages(turns)
        return self._render_marked(messages) if self._marked else self._render_stepwise(messages)

    def render_prompt(self, turns: Sequence[ConversationTurn]) -> str:
        """Render the text after which the next answer is generated.

        Raises:
            SampleError: the template refuses the turns.
        """
        return self._apply(_to_messages(turns), prompt=True)

    def _render_marked(self, messages: list[Message]) -> tuple[str, CharacterSpans]:
        """Render with a template that marks answers."""
        from transformers.utils.chat_template_utils import render_jinja_template  # imports torch

        options = {
            "chat_template": self.source,
            "return_assistant_tokens_mask": True,
            **self._tokenizer.special_tokens_map,
        }
        try:
            # annotated as a string; with the mask it returns a pair of lists
            rendered: Any = render_jinja_template([messages], **options)
        except TemplateError as error:
            raise _refused(error) from None
        (text,), (spans,) = rendered
        if text != self._apply(messages):
            raise SampleError(
                "its chat template gives a different text when answers are marked",
                "labels would be misplaced.",
                "fix the template.",
            )
        answers = [(start, end) for start, end in spans if end > start]
        if not answers:
            raise SampleError(
                "the chat template marks no answer",
                "nothing would be supervised.",
                "fix the template.",
            )
        return text, answers

    def _render_stepwise(self, messages: list[Message]) -> tuple[str, CharacterSpans]:
        """Render up to each answer, without and with it, to find its characters."""
        text, spans = self._apply(messages), []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._apply(messages[:k], prompt=True)
            answered = self._apply(messages[: k + 1])
            if not (text.startswith(answered) and answered.startswith(prompt)):
                raise _uncertain(
                    f"its chat template changes the turns before turn {k} once that turn is there"
                )
            added, answer = answered[len(prompt) :], message["content"].strip()
            if not added.lstrip().startswith(answer):
                raise _uncertain(
                    f"between the prompt and the answer in turn {k} its chat template writes "
                    f"{_before_answer(added, answer)!r}"
                )
            if not added.lstrip()[len(answer) :].strip():
                raise _uncertain(
                    f"its chat template writes nothing after the answer in turn {k}, so the model "
                    "could not learn where to stop"
                )
            bare = added.rstrip()
            # what follows the token that ends the turn is never generated
            ends = any(bare.endswith(token) for token in self._control_tokens)
            spans.append((len(prompt), len(prompt) + len(bare if ends else added)))
        return text, spans

    def _apply(self, messages: list[Message], *, prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, IndexError) as error:  # IndexError: templates that use messages[0]
            raise _refused(error) from None
        return text


def _to_messages(turns: Sequence[ConversationTurn]) -> list[Message]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def _before_answer(added: str, answer: str) -> str:
    position = added.find(answer)
    return added[: position if position > 0 else 40]


def _refused(error: Exception) -> SampleError:
    return SampleError(
        f"its chat template refuses the conversation: {error}",
        "the sample has no text.",
        "fix the turns, or leave the sample out.",
    )


def _uncertain(what: str) -> SampleError:
    return SampleError(
        what,
        "answers cannot be separated from the rest.",
        "mark them with {% generation %} in the template.",
    )
