r"""The text of a sample as token ids and labels, in the three text formats.

`caption`: BOS, caption, EOS; everything but BOS is supervised (the reference's pretraining). If a
sample has several captions, captions.py chooses one.

`conversation`: the reference's instruction format, encoded as one string with BOS and EOS:

    {HEADER}### Human: {question}\n### Assistant: {answer}\n### Human: ...\n###

Each answer with its end, " {answer}\n###", is supervised. A system turn replaces the header.

`chat`: the LLM's own chat template (`common/chat_template.py`), with BOS. Each answer is supervised
together with the token with which the template ends it.

Supervised tokens are found by their character offsets while the text is built, so an answer that
also occurs elsewhere, or inside a question, cannot be mistaken. Longer texts are cut at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer

from onellm_dist.common.chat_template import ChatTemplate
from onellm_dist.common.control_tokens import describe_control_token, list_forbidden_ids
from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.start_token import get_start_id
from onellm_dist.common.token_limit import (
    describe_tokens_without_embedding,
    find_tokens_without_embedding,
)
from onellm_dist.common.turns import ConversationTurn, Role
from onellm_dist.data.text_parts import read_captions, read_turns
from onellm_dist.modalities.base import Part
from onellm_dist.packed import IGNORE

TextFormat = Literal["caption", "conversation", "chat"]
FORMATS: tuple[TextFormat, ...] = ("caption", "conversation", "chat")
HEADER = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n"
)
"""Opens every conversation without a system turn (OneLLM's training header)."""
TURN = "### {speaker}: {value}\n"
STOP = "###"
"""Ends an answer; generation stops at it."""
SPEAKERS: Mapping[Role, str] = {"user": "Human", "assistant": "Assistant", "system": "System"}
"""Role to speaker in the format `conversation`."""
FORMAT_VERSION = 2
"""Raise it when the tokens of a format change: token counts made before are then ignored."""


class TextEncoder:
    """Encodes texts as ids and labels, for one tokenizer, text format and maximum length.

    An encoder can be pickled, and other users of the tokenizer do not affect it.

    Args:
        tokenizer: a fast transformers tokenizer (PreTrainedTokenizerFast).
        text_format: `caption`, `conversation` or `chat`.
        max_tokens: longer texts are cut to this many tokens.
        pairs: whether samples are preference pairs (`pair_text.py` encodes them).

    Raises:
        UsageError: the tokenizer is not a fast one, has no BOS or EOS, or lacks a usable chat
            template; the text format is unknown; or the LLM has no embedding of a token that
            begins or ends every text.
    """

    def __init__(
        self, tokenizer: Any, text_format: TextFormat, max_tokens: int, *, pairs: bool = False
    ) -> None:
        backend = _check_arguments(tokenizer, text_format, max_tokens)
        self.bos: int = get_start_id(tokenizer) or 0  # checked above
        """First token of every text."""
        self.eos: int = tokenizer.eos_token_id
        """Last token of a caption or conversation that was not cut."""
        self.text_format: TextFormat = text_format
        self.max_tokens = max_tokens
        self.pairs = pairs
        self._chat = ChatTemplate(tokenizer) if text_format == "chat" else None
        self._backend = _copy_tokenizer(backend, special_tokens=self._chat is not None)
        self._forbidden = {} if self._chat else list_forbidden_ids(tokenizer)
        self._beyond = find_tokens_without_embedding(tokenizer)
        self._check_ends()
        template = (
            (self._chat.source, tokenizer.special_tokens_map, *self._chat.identity)
            if self._chat
            else None
        )
        identity = (
            self._backend.to_str(),
            self.bos,
            self.eos,
            text_format,
            max_tokens,
            FORMAT_VERSION,
            template,
            *([sorted(self._beyond)] if self._beyond else []),
            *(["pairs"] if pairs else []),
        )
        self.fingerprint = hashlib.sha256(repr(identity).encode("utf-8")).hexdigest()[:16]
        """Hash of everything that token counts depend on besides the text."""
        self.media_encoders: dict[tuple[str, ...], TextEncoder] = {}
        """The encoders of datasets that list their media, by modalities (`media_text.py`)."""

    def encode(
        self, parts: Mapping[str, Part], choose: Callable[[int], int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Encode a sample's text.

        Args:
            parts: the sample's text parts by extension.
            choose: from the number of captions to the index of one; default: the first.

        Returns:
            Ids and labels (IGNORE where a token is not supervised), equally long, BOS first.

        Raises:
            SampleError: there is no text part, it is not UTF-8 or JSON, it does not fit the text
                format, or it has a token that the LLM has no embedding of.
        """
        if self.text_format == "caption":
            captions = read_captions(parts)
            index = choose(len(captions)) if choose and len(captions) > 1 else 0
            return self._encode_caption(captions[index])
        return self._encode_conversation(self._read_turns(parts))

    def encode_turns(self, turns: Sequence[ConversationTurn]) -> tuple[list[int], list[int]]:
        """Encode a conversation; as `encode`.

        Raises:
            SampleError: every answer has weight 0, or a token cannot be used.
        """
        return self._encode_conversation(turns)

    def _read_turns(self, parts: Mapping[str, Part]) -> Sequence[ConversationTurn]:
        return read_turns(parts)

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        return ids[: self.max_tokens], labels[: self.max_tokens]

    def encode_all(self, parts: Mapping[str, Part]) -> list[tuple[list[int], list[int]]]:
        """Encode every text the sample may be read with: its captions, or its one conversation.

        Raises:
            SampleError: see `encode`.
        """
        if self.text_format == "caption":
            return [self._encode_caption(caption) for caption in read_captions(parts)]
        return [self.encode(parts)]

    def encode_prompt(self, turns: Sequence[ConversationTurn]) -> list[int]:
        """Encode what comes before the next answer, exactly as in training (format `chat` only).

        Raises:
            SampleError: the chat template refuses the turns, or a token has no embedding.
        """
        if self._chat is None:
            raise ValueError(f"the format {self.text_format} has no chat template")
        text = self._chat.render_prompt(turns)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        self._check_embeddings(ids)
        return ids if self._chat.has_bos else [self.bos, *ids]

    @property
    def end_ids(self) -> list[int]:
        """Ids that end an answer in the format `chat`: EOS and the template's own end token."""
        end = self._chat.end if self._chat else ""
        id_of_end = self._backend.token_to_id(end)
        return sorted({self.eos} if id_of_end is None else {self.eos, id_of_end})

    @property
    def end_text(self) -> str | None:
        """Text that ends an answer in the format `chat`; None: a token does (`end_ids`)."""
        end = self._chat.end if self._chat else ""
        return end if end and self._backend.token_to_id(end) is None else None

    def _check_ends(self) -> None:
        """Refuse a tokenizer whose BOS, EOS or end of an answer has no embedding."""
        found = describe_tokens_without_embedding([self.bos, *self.end_ids], self._beyond)
        if found is not None:
            raise UsageError(
                f"the tokenizer begins or ends texts with {found}, which the LLM has no embedding "
                "of",
                "no text could be read or written.",
                "enlarge the LLM's embedding (resize_token_embeddings) and convert it again, or "
                "use another data.text_format.",
            )

    def _check_embeddings(self, ids: Sequence[int]) -> None:
        found = describe_tokens_without_embedding(ids, self._beyond)
        if found is not None:
            raise SampleError(
                f"its text has {found}, which the LLM has no embedding of",
                "the LLM cannot read it.",
                "remove it from the text, leave the sample out, or enlarge the LLM's embedding.",
            )

    def _encode(self, text: str) -> Encoding:
        """Encode text; in captions and conversations, control tokens are text.

        Raises:
            SampleError: the tokenizer reads a control token nevertheless, or the LLM has no
                embedding of a token.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        if problem := describe_control_token(encoding.ids, self._forbidden):
            raise SampleError(
                problem,
                "the LLM would take it for the end or the beginning of a text.",
                "remove it from the text, or leave the sample out.",
            )
        self._check_embeddings(encoding.ids)
        return encoding

    def _encode_caption(self, caption: str) -> tuple[list[int], list[int]]:
        ids = [*self._encode(caption).ids, self.eos]
        return self._cut([self.bos, *ids], [IGNORE, *ids])

    def _encode_conversation(
        self, turns: Sequence[ConversationTurn]
    ) -> tuple[list[int], list[int]]:
        text, answers = self._chat.render(turns) if self._chat else render_conversation(turns)
        if not answers:
            raise SampleError(
                "every answer of its conversation has weight 0",
                "nothing would be supervised.",
                "leave the sample out.",
            )
        encoding = self._encode(text)
        ids: list[int] = encoding.ids
        labels = [IGNORE] * len(ids)
        token = 0
        for start, end in answers:  # answers and tokens are in order: one pass over both
            while token < len(labels) and encoding.offsets[token][1] <= start:
                token += 1
            if self._chat and token < len(labels) and encoding.offsets[token][0] < start:
                raise _mixed_token(text, encoding.offsets[token])
            while token < len(labels) and encoding.offsets[token][0] < end:
                labels[token] = ids[token]
                token += 1
            if (
                self._chat
                and token
                and labels[token - 1] != IGNORE
                and encoding.offsets[token - 1][1] > end
            ):
                raise _mixed_token(text, encoding.offsets[token - 1])
        if self._chat is None:
            ids, labels = [self.bos, *ids, self.eos], [IGNORE, *labels, IGNORE]
        elif not self._chat.has_bos:
            ids, labels = [self.bos, *ids], [IGNORE, *labels]
        return self._cut(ids, labels)


def _check_arguments(tokenizer: Any, text_format: str, max_tokens: int) -> Tokenizer:
    """Return the tokenizer's backend after checking the arguments of a TextEncoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UsageError(
            f"the tokenizer ({type(tokenizer).__name__}) is not a fast one",
            "labels of conversations are found by character offsets, which only fast tokenizers "
            "provide.",
            "save it as a tokenizer.json (PreTrainedTokenizerFast) beside the model.",
        )
    if text_format not in FORMATS:
        raise UsageError(
            f"unknown text format {text_format!r}",
            "the layout of the text is not defined.",
            f"use {' or '.join(FORMATS)}.",
        )
    if max_tokens < 2:
        raise UsageError(
            f"data.max_text_tokens={max_tokens} leaves no token to supervise",
            "the first token is BOS.",
            "use at least 2; the paper uses 96 and 2018.",
        )
    missing = [
        name
        for name, token in (("BOS", get_start_id(tokenizer)), ("EOS", tokenizer.eos_token_id))
        if token is None
    ]
    if missing:
        raise UsageError(
            f"the tokenizer ({type(tokenizer).__name__}) has no {missing[0]} token",
            "texts begin with BOS (media spans follow it) and end with EOS.",
            "set tokenizer.bos_token and tokenizer.eos_token, and save it beside the model.",
        )
    return backend


def _mixed_token(text: str, offsets: tuple[int, int]) -> SampleError:
    return SampleError(
        f"the tokenizer makes one token of {text[slice(*offsets)]!r}, only part of which belongs "
        "to an answer",
        "such a token can be neither supervised nor left out.",
        "use data.text_format=conversation, or another chat template.",
    )


def _copy_tokenizer(backend: Tokenizer, *, special_tokens: bool) -> Tokenizer:
    """Copy a tokenizer without the truncation and padding that other callers may have set.

    Args:
        backend: the tokenizer.
        special_tokens: whether "</s>" in a text is encoded as the special token.
    """
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = not special_tokens
    return copy


def render_conversation(turns: Sequence[ConversationTurn]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation in the reference's format.

    Returns:
        The text, and for each answer the characters [start, end) that are supervised. They begin
        at the space before the answer (many tokenizers join it to the first word, and generation
        continues from "### Assistant:") and end after the "###" that follows.
    """
    text, turns = render_opening(turns)
    answers = []
    for turn in turns:
        rendered = render_turn(turn)
        if turn.role == "assistant" and turn.weight:
            start = len(text) + len(f"{STOP} {SPEAKERS[turn.role]}:")
            answers.append((start, len(text) + len(rendered) + len(STOP)))
        text += rendered
    return text + f"{STOP} ", answers


def render_opening(
    turns: Sequence[ConversationTurn],
) -> tuple[str, Sequence[ConversationTurn]]:
    """Return what a conversation opens with (its system turn or HEADER), and its other turns."""
    if turns and turns[0].role == "system":
        return f"{turns[0].text}\n\n", turns[1:]
    return HEADER, turns


def render_turn(turn: ConversationTurn) -> str:
    """Return one turn in the reference's format."""
    return TURN.format(speaker=SPEAKERS[turn.role], value=turn.text)


def render_answer_prefix() -> str:
    """Return what precedes an answer in the reference's format, without the space after it."""
    return f"{STOP} {SPEAKERS['assistant']}:"
