"""The text of a sample as token ids and labels, in the three formats of training.

`caption`: BOS, caption, EOS; all but BOS supervised (the reference's pretraining). Of several captions one is chosen (captions.py).
`conversation`: the reference's instruction format, encoded as one string with BOS and EOS:

    {HEADER}### Human: {question}\\n### Assistant: {answer}\\n### Human: ...\\n###

of which each answer with its end, " {answer}\\n###", is supervised. A system turn at the beginning stands in place of the header.
`chat`: the LLM's own chat template (chat.py), with BOS; each answer with the template's end of a turn is supervised.

The tokens are found by the characters they stand for (the tokenizer's offsets) while the text is built, so an answer that
occurs twice, or in a question, cannot be mistaken. Longer texts are cut at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from tokenizers import Tokenizer

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.data.chat import ChatTemplate
from onellm_dist.modalities.base import Part
from onellm_dist.packed import IGNORE

TextFormat = Literal["caption", "conversation", "chat"]
FORMATS: tuple[TextFormat, ...] = ("caption", "conversation", "chat")
HEADER = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n"
)
"""Opens every conversation (OneLLM's training header)."""
TURN = "### {speaker}: {value}\n"
STOP = "###"
"""Ends an answer; generation stops at it."""
SYSTEM = "System"
SPEAKERS = {
    "human": "Human",
    "user": "Human",
    "gpt": "Assistant",
    "assistant": "Assistant",
    "system": SYSTEM,
}
FORMAT_VERSION = 2
"""Raise it when the tokens of either format change: the length sidecars made before are then no longer used."""
_MEDIA_TAG = "<image>"


class TextEncoder:
    """Texts to ids and labels for one tokenizer, format and length. Picklable, and untouched by other users of the tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer (PreTrainedTokenizerFast).
        text_format: `caption`, `conversation` or `chat`.
        max_tokens: longer texts are cut to this many tokens.

    Raises:
        UsageError: the tokenizer is not a fast one, has no BOS or no EOS, or no (usable) chat template where one is wanted; no such format.
    """

    def __init__(self, tokenizer: Any, text_format: TextFormat, max_tokens: int) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UsageError(
                f"the tokenizer ({type(tokenizer).__name__}) is not a fast one",
                "labels of conversations are found by the character offsets that only fast tokenizers give.",
                "save it as a tokenizer.json (PreTrainedTokenizerFast) beside the model.",
            )
        if text_format not in FORMATS:
            raise UsageError(
                f"unknown text format {text_format!r}",
                "no such layout of text is known.",
                f"use {' or '.join(FORMATS)}.",
            )
        if max_tokens < 2:
            raise UsageError(
                f"data.max_text_tokens={max_tokens} leaves no token to supervise",
                "the first token is BOS.",
                "use at least 2; the paper's are 96 and 2018.",
            )
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None or eos is None:
            raise UsageError(
                f"the tokenizer ({type(tokenizer).__name__}) has no {'BOS' if bos is None else 'EOS'} token",
                "texts begin with BOS (modality runs stand after it) and end with EOS.",
                "set tokenizer.bos_token and tokenizer.eos_token, and save it beside the model.",
            )
        self.bos: int = bos
        """First token of every text."""
        self.eos: int = eos
        self.text_format: TextFormat = text_format
        self.max_tokens = max_tokens
        self._chat = ChatTemplate(tokenizer) if text_format == "chat" else None
        self._backend = _plain_copy(backend, specials=self._chat is not None)
        template = (self._chat.source, tokenizer.special_tokens_map) if self._chat else None
        identity = (
            self._backend.to_str(),
            self.bos,
            self.eos,
            text_format,
            max_tokens,
            FORMAT_VERSION,
            template,
        )
        self.fingerprint = hashlib.sha256(repr(identity).encode("utf-8")).hexdigest()[:16]
        """Names everything that text lengths depend on, besides the text."""

    def encode(
        self, parts: Mapping[str, Part], choose: Callable[[int], int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and labels (IGNORE where not supervised) of a sample's text parts, by extension; equal lengths, BOS first.

        Args:
            choose: how many captions there are -> which one; the first where not given.

        Raises:
            SampleError: no text part, not UTF-8, not JSON, or not in this format.
        """
        if self.text_format == "caption":
            captions = captions_of(parts)
            return self._caption(
                captions[choose(len(captions)) if choose and len(captions) > 1 else 0]
            )
        return self._conversation(turns_of(parts))

    def variants(self, parts: Mapping[str, Part]) -> list[tuple[list[int], list[int]]]:
        """`encode` for each text that the sample may be read with: its captions, or its one conversation.

        Raises:
            SampleError: see `encode`.
        """
        if self.text_format == "caption":
            return [self._caption(caption) for caption in captions_of(parts)]
        return [self.encode(parts)]

    def prompt(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Of the format `chat`: the ids after which the next answer to (speaker, value) turns is generated, exactly as in training.

        Raises:
            SampleError: the chat template refuses the turns.
        """
        if self._chat is None:
            raise ValueError(f"a prompt of the format {self.text_format}")
        ids: list[int] = self._backend.encode(
            self._chat.prompt(turns), add_special_tokens=False
        ).ids
        return ids if self._chat.has_bos else [self.bos, *ids]

    @property
    def ends(self) -> list[int]:
        """Of the format `chat`: ids that end an answer: EOS, and the token with which the template ends one."""
        _, labels = self._conversation([("Human", "a"), ("Assistant", "b")])
        return sorted({self.eos, next(label for label in reversed(labels) if label != IGNORE)})

    def _caption(self, caption: str) -> tuple[list[int], list[int]]:
        ids = [*self._backend.encode(caption, add_special_tokens=False).ids, self.eos]
        return [self.bos, *ids][: self.max_tokens], [IGNORE, *ids][: self.max_tokens]

    def _conversation(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        text, answers = self._chat.render(turns) if self._chat else render_conversation(turns)
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        labels = [IGNORE] * len(ids)
        token = 0
        for start, end in answers:  # both lists are in order: one pass
            while token < len(labels) and encoding.offsets[token][1] <= start:
                token += 1
            if self._chat and token < len(labels) and encoding.offsets[token][0] < start:
                raise _joined(text, encoding.offsets[token])
            while token < len(labels) and encoding.offsets[token][0] < end:
                labels[token] = ids[token]
                token += 1
            if (
                self._chat
                and token
                and labels[token - 1] != IGNORE
                and encoding.offsets[token - 1][1] > end
            ):
                raise _joined(text, encoding.offsets[token - 1])
        if self._chat is None:
            ids, labels = [self.bos, *ids, self.eos], [IGNORE, *labels, IGNORE]
        elif not self._chat.has_bos:
            ids, labels = [self.bos, *ids], [IGNORE, *labels]
        return ids[: self.max_tokens], labels[: self.max_tokens]


def encode(
    parts: Mapping[str, Part], tokenizer: Any, text_format: TextFormat, max_tokens: int
) -> tuple[list[int], list[int]]:
    """`TextEncoder.encode` for one sample; keep a TextEncoder for many."""
    return _encoder(tokenizer, text_format, max_tokens).encode(parts)


@lru_cache(maxsize=4)
def _encoder(tokenizer: Any, text_format: TextFormat, max_tokens: int) -> TextEncoder:
    return TextEncoder(tokenizer, text_format, max_tokens)


def _joined(text: str, offsets: tuple[int, int]) -> SampleError:
    return SampleError(
        f"the tokenizer makes one token of {text[slice(*offsets)]!r}, which is partly an answer and partly not",
        "it can be neither supervised nor left out.",
        "use data.text_format=conversation, or another chat template.",
    )


def _plain_copy(backend: Tokenizer, *, specials: bool) -> Tokenizer:
    """The tokenizer without truncation and padding (state that other callers leave); `specials`: "</s>" in a text is its token."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = not specials
    return copy


def caption_of(parts: Mapping[str, Part]) -> str:
    """The caption; of several, the first. See `captions_of`."""
    return captions_of(parts)[0]


def captions_of(parts: Mapping[str, Part]) -> list[str]:
    """The captions, at least one: the `.txt` part, else `caption` or `captions` of the `.json` part, a string or a list of strings.

    Raises:
        SampleError: there is none, or one is no text (not UTF-8, half a surrogate pair).
    """
    if "txt" in parts:
        return [_utf8(parts["txt"])]
    meta = meta_of(parts)
    caption = meta.get("caption", meta.get("captions"))
    captions = caption if isinstance(caption, list) else [caption]
    if not captions or not all(isinstance(one, str) for one in captions):
        raise SampleError(
            "no caption: the sample has neither a .txt part nor a string (or a list of strings) `caption` in its .json",
            "the caption format has nothing to train on.",
            "give it one, or use data.text_format=conversation.",
        )
    for one in captions:
        _require_text(one, "its caption")
    return captions


def meta_of(parts: Mapping[str, Part]) -> Mapping[str, Any]:
    """The `.json` part as a mapping; empty where there is none.

    Raises:
        SampleError: it is no JSON object in UTF-8.
    """
    if "json" not in parts:
        return {}
    try:
        meta = json.loads(_utf8(parts["json"]))
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: also an integer of more than 4300 digits
        raise SampleError(
            f"its .json part is not JSON: {error}",
            "the sample cannot be read.",
            "build the dataset again.",
        ) from None
    if not isinstance(meta, dict):
        raise SampleError(
            "its .json part is no JSON object",
            "captions and conversations are looked up in it.",
            "build the dataset again.",
        )
    return meta


def turns_of(parts: Mapping[str, Part]) -> list[tuple[str, str]]:
    """(speaker, value) of each turn of `conversations` in the `.json` part; the media tag is taken out.

    Turns are `from` and `value`, or `role` and `content`; a speaker is `Human`, `Assistant`, or, in the first turn alone, `System`.

    Raises:
        SampleError: there are none, a turn is malformed or no text, or nobody answers.
    """
    raw = meta_of(parts).get("conversations")
    if not isinstance(raw, list) or not raw:
        raise SampleError(
            "no `conversations` in the sample's .json",
            "the conversation format trains on answers.",
            "use data.text_format=caption.",
        )
    turns: list[tuple[str, str]] = []
    for number, given in enumerate(raw):
        turn = given if isinstance(given, dict) else {}
        speaker = SPEAKERS.get(str(turn.get("from", turn.get("role", ""))).lower())
        value = turn.get("value", turn.get("content"))
        if speaker is None or not isinstance(value, str):
            raise SampleError(
                f"turn {number} of its conversation is not {{'from': 'human' | 'gpt' | 'system', 'value': text}}",
                "speaker and text cannot be told.",
                "mend the dataset's source and build it again.",
            )
        _require_text(value, f"turn {number} of its conversation")
        if speaker == SYSTEM and turns:
            raise SampleError(
                f"turn {number} of its conversation is a system turn",
                "only the first may be.",
                "mend the dataset's source.",
            )
        turns.append(
            (speaker, value.replace(_MEDIA_TAG, "").strip() if _MEDIA_TAG in value else value)
        )
    if all(speaker != "Assistant" for speaker, _ in turns):
        raise SampleError(
            "its conversation has no answer",
            "nothing in it would be supervised.",
            "leave the sample out of the dataset.",
        )
    return turns


def render_conversation(turns: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and for each answer the characters [start, end) that are supervised.

    They begin at the space before the answer (many tokenizers join it to the first word, and generation goes on from
    "### Assistant:") and end behind the "###" that follows.
    """
    text, turns = opening(turns)
    answers = []
    for speaker, value in turns:
        turn = TURN.format(speaker=speaker, value=value)
        if speaker == "Assistant":
            answers.append(
                (len(text) + len(f"{STOP} {speaker}:"), len(text) + len(turn) + len(STOP))
            )
        text += turn
    return text + f"{STOP} ", answers


def opening(turns: Sequence[tuple[str, str]]) -> tuple[str, Sequence[tuple[str, str]]]:
    """What a conversation opens with (the system turn and an empty line, else HEADER), and its other turns."""
    if turns and turns[0][0] == SYSTEM:
        return f"{turns[0][1]}\n\n", turns[1:]
    return HEADER, turns


def _require_text(text: str, what: str) -> None:
    """JSON can say "\\ud83d" alone, half a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            f"{what} is no text: half a surrogate pair, {text[error.start]!a}, at character {error.start}",
            "no tokenizer takes it.",
            "mend the dataset's source and build it again.",
        ) from None


def _utf8(part: Part) -> str:
    try:
        return part.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(
            f"its .{part.extension} part is not UTF-8: {error.reason} at byte {error.start}",
            "the text would be wrong in silence.",
            "convert the source to UTF-8 and build the dataset again.",
        ) from None
