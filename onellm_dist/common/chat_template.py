"""Conversations in the LLM's own chat template, with the exact characters of every answer.

If the template marks answers (`{% generation %}`), its marks are used, as far as they agree with
the prompt for generation: an answer begins where its prompt ends, and ends with the token that ends
its turn. Otherwise the conversation is rendered up to each answer, once without it (the prompt for
generation) and once with it: what is added is the answer and its end. A template for which this
does not hold is refused, for example one that writes something between prompt and answer.

Templates of reasoning models (Qwen3) rewrite earlier turns. Their conversations of one answer can
be read; what they write for thoughts follows the answer (`enable_thinking` is true where it has
thoughts). A template that writes today's date gets FIXED_DATE, so that token ids stay the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from onellm_dist.common.control_tokens import find_control_token, list_control_tokens
from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.turns import ConversationTurn

Message = dict[str, str]
CharacterSpans = list[tuple[int, int]]

FIXED_DATE = datetime(2024, 7, 26)
"""Today, for every template: the date that Llama 3.1's own template falls back to."""
THOUGHTS = "</think>"
"""Ends the thoughts of an answer."""
_TODAY = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")
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
        self.source: str = _fix_date(tokenizer.get_chat_template())
        """The template's text, with FIXED_DATE for today."""
        self._marked = _MARK.search(self.source) is not None
        self._thinks = "enable_thinking" in self.source
        self._control_tokens = list(list_control_tokens(tokenizer).values())
        self._closes = False
        text, answers = self._render_example()
        self.end: str = self._find_end(text[slice(*answers[-1])])
        """What ends an answer: a control token, else the text behind it."""
        first = self._apply(_to_messages(_EXAMPLE[:2]))
        bos = tokenizer.bos_token
        self.has_bos = bool(bos) and text.startswith(bos) and first.count(bos) == 1
        """Whether the text begins with BOS, once for all turns (in ChatML, the BOS of some
        tokenizers opens every turn)."""
        self.identity: tuple[str, ...] = (
            *(["thoughts"] if self._thinks else []),
            *(["marks"] if self._marked and self._marks_moved() else []),
        )
        """What else token ids and labels depend on, besides the template's text."""

    def _render_example(self) -> tuple[str, CharacterSpans]:
        """Render a conversation of two answers, or of one where the template takes no more.

        Raises:
            UsageError: answers cannot be separated from the rest.
        """
        try:
            return self.render(_EXAMPLE)
        except SampleError as error:
            several = error
        self._closes = not self._marked
        for example in (_EXAMPLE, _EXAMPLE[:2]):
            try:
                rendered = self.render(example)
            except SampleError:
                continue
            if len(example) == 2:
                self._closes = False
                rendered = self.render(example)
                get_logger(__name__).warning(
                    "the chat template takes conversations of one answer alone (%s); samples with "
                    "more are skipped",
                    several.what,
                )
            return rendered
        raise UsageError(
            "data.text_format=chat: the tokenizer's chat template cannot be supervised "
            f"exactly: {several.what}",
            "words outside an answer would be trained on, or answers left out.",
            "mark the answers in the template with {% generation %} ... {% endgeneration %}, "
            "or use data.text_format=conversation.",
        )

    def _find_end(self, answer: str) -> str:
        """What ends an answer of the example: its control token, else what follows its words."""
        bare = answer.rstrip()
        token = max((t for t in self._control_tokens if bare.endswith(t)), key=len, default="")
        last = _EXAMPLE[3].text if _EXAMPLE[3].text in bare else _EXAMPLE[1].text
        return token or bare[bare.rfind(last) + len(last) :].strip()

    def _marks_moved(self) -> bool:
        """Whether the marks of the example are not used as they stand."""
        messages = _to_messages(_EXAMPLE)
        try:
            text, marks = self._read_marks(messages)
            return self._place_marks(messages, text, marks) != marks
        except SampleError:
            return True

    def render(self, turns: Sequence[ConversationTurn]) -> tuple[str, CharacterSpans]:
        """Render a conversation.

        Returns:
            The text, and for each answer its characters [start, end), its end included.

        Raises:
            SampleError: the template refuses the conversation, an answer's position is uncertain,
                or a turn contains a control token.

        Answers of weight 0 have no characters.
        """
        self._check_turns(turns)
        messages = _to_messages(turns)
        if self._marked:
            text, marks = self._read_marks(messages)
            spans = self._place_marks(messages, text, marks)
        else:
            text, spans = self._render_stepwise(messages)
        weights = [turn.weight for turn in turns if turn.role == "assistant"]
        return text, [span for span, weight in zip(spans, weights, strict=True) if weight]

    def render_prompt(self, turns: Sequence[ConversationTurn]) -> str:
        """Render the text after which the next answer is generated.

        Raises:
            SampleError: the template refuses the turns, or one contains a control token.
        """
        self._check_turns(turns)
        return self._apply(_to_messages(turns), prompt=True)

    def _check_turns(self, turns: Sequence[ConversationTurn]) -> None:
        for turn in turns:
            if token := find_control_token(turn.text, self._control_tokens):
                raise SampleError(
                    f"a turn of its conversation contains the control token {token!r}",
                    "in the chat template it would begin or end a turn.",
                    "remove it from the text, or leave the sample out.",
                )

    def _read_marks(self, messages: list[Message]) -> tuple[str, CharacterSpans]:
        """Render with a template that marks answers: the text, and what it marks."""
        from transformers.utils.chat_template_utils import render_jinja_template  # imports torch

        options = {
            "chat_template": self.source,
            "return_assistant_tokens_mask": True,
            **self._tokenizer.special_tokens_map,
            **self._get_options(messages),
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
        count = sum(message["role"] == "assistant" for message in messages)
        if len(answers) != count:
            raise SampleError(
                f"the chat template marks {len(answers)} of {format_count(count, 'answer')}",
                "the others would not be supervised.",
                "fix the template.",
            )
        return text, answers

    def _place_marks(
        self, messages: list[Message], text: str, marks: CharacterSpans
    ) -> CharacterSpans:
        """Hold marks against the prompt before each answer and the end behind it."""
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        placed = []
        for k, (start, end) in zip(turns, marks, strict=True):
            begin = self._find_beginning(messages, k, text, start) if k else start
            between = text[begin:start].strip()
            if between or begin > end:
                raise _uncertain(
                    f"between the prompt and the answer in turn {k} its chat template writes "
                    f"{between!r}"
                )
            bare = text[begin:end].rstrip()
            content = messages[k]["content"].strip()
            ends = any(bare.endswith(token) for token in self._control_tokens)
            if not ends and not bare[bare.rfind(content) + len(content) :]:
                raise _uncertain(
                    f"its chat template does not mark what ends the answer in turn {k}, so the "
                    "model could not learn where to stop"
                )
            # what follows the token that ends the turn is never generated
            placed.append((begin, begin + len(bare) if ends else end))
        return placed

    def _find_beginning(self, messages: list[Message], k: int, text: str, start: int) -> int:
        """Where the answer in turn k begins, near the mark at `start`."""
        options = self._get_options(messages)
        prompt = self._apply(messages[:k], options, prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # A template that rewrites earlier turns: what it adds to open an answer must be there.
        so_far = self._apply(messages[:k], options)
        header = prompt[len(so_far) :] if prompt.startswith(so_far) else ""
        if header and text.startswith(header, start):
            return start + len(header)
        if header and text.endswith(header, 0, start):
            return start
        raise _uncertain(
            f"its chat template opens the answer in turn {k} otherwise than in the "
            "prompt for generation"
        )

    def _render_stepwise(self, messages: list[Message]) -> tuple[str, CharacterSpans]:
        """Render up to each answer, without and with it, to find its characters."""
        options = self._get_options(messages)
        text, spans = self._apply(messages, options), []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._apply(messages[:k], options, prompt=True)
            answered = text if self._closes else self._apply(messages[: k + 1], options)
            if not (text.startswith(answered) and answered.startswith(prompt)):
                raise _uncertain(_describe_change(text, prompt, k))
            added, answer = answered[len(prompt) :], message["content"].strip()
            if self._thinks and THOUGHTS in answer:
                # The template lays thoughts out anew; all but the blanks must be the same.
                added_words, answer = "".join(added.split()), "".join(answer.split())
            else:
                added_words = added.lstrip()
            if not added_words.startswith(answer):
                raise _uncertain(
                    f"between the prompt and the answer in turn {k} its chat template writes "
                    f"{_before_answer(added, answer)!r}"
                )
            if not added_words[len(answer) :].strip():
                raise _uncertain(
                    f"its chat template writes nothing after the answer in turn {k}, so the model "
                    "could not learn where to stop"
                )
            if self._closes:
                added = self._cut_behind_end(added, answer, k)
            bare = added.rstrip()
            # what follows the token that ends the turn is never generated
            ends = any(bare.endswith(token) for token in self._control_tokens)
            spans.append((len(prompt), len(prompt) + len(bare if ends else added)))
        return text, spans

    def _cut_behind_end(self, added: str, answer: str, k: int) -> str:
        """The answer with its end token, where a template writes more behind the last turn."""
        start = added.find(answer) + len(answer)
        rest = added[start:]
        blanks = len(rest) - len(rest.lstrip())
        for token in sorted(self._control_tokens, key=len, reverse=True):
            if rest.startswith(token, blanks):
                return added[: start + blanks + len(token)]
        raise _uncertain(f"no token ends the answer in turn {k}")

    def _get_options(self, messages: list[Message]) -> dict[str, Any]:
        """Values of the variables that the template may read besides the messages."""
        if not self._thinks:
            return {}
        answers = [message for message in messages if message["role"] == "assistant"]
        return {"enable_thinking": any(THOUGHTS in answer["content"] for answer in answers)}

    def _apply(
        self,
        messages: list[Message],
        options: dict[str, Any] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
                **(self._get_options(messages) if options is None else options),
            )
        except (TemplateError, IndexError) as error:  # IndexError: templates that use messages[0]
            raise _refused(error) from None
        return text


def _to_messages(turns: Sequence[ConversationTurn]) -> list[Message]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def _fix_date(source: str) -> str:
    """A template's text with FIXED_DATE in place of `strftime_now("...")`.

    Raises:
        UsageError: it asks for the date in a form that is known only when it is rendered.
    """
    fixed = _TODAY.sub(lambda call: repr(FIXED_DATE.strftime(call[2])), source)
    if re.search(r"strftime_now\s*\(", fixed):
        raise UsageError(
            "data.text_format=chat: the chat template writes today's date in a computed form",
            "token ids would be others every day.",
            "write the form into its call of strftime_now, or a date in place of the call.",
        )
    return fixed


def _describe_change(text: str, prompt: str, k: int) -> str:
    """Why the prompt before turn k is not the beginning of the conversation."""
    same = next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), 0)
    if prompt[same:].strip() and len(prompt) - same < 40 and not text.startswith(prompt):
        return (
            f"its chat template opens the answer in turn {k} with {prompt[same:]!r} in the prompt "
            "for generation, and not in the conversation; it changes the turns before"
        )
    return f"its chat template changes the turns before turn {k} once that turn is there"


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
