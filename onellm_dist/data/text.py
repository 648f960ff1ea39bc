"""The text of a sample as token ids and labels, in the two formats of training.

`caption`: BOS, caption, EOS; all but BOS supervised (the reference's pretraining).
`conversation`: the reference's instruction format, encoded as one string with BOS and EOS:

    {HEADER}### Human: {question}\\n### Assistant: {answer}\\n### Human: ...\\n###

of which each answer with its end, " {answer}\\n###", is supervised. The tokens are found by the characters they stand for
(the tokenizer's offsets) while the text is built, so an answer that occurs twice, or in a question, cannot be mistaken.
Longer texts are cut at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from tokenizers import Tokenizer

from onellm_dist.errors import SampleError, UsageError
from onellm_dist.modalities.base import Part
from onellm_dist.packed import IGNORE

TextFormat = Literal["caption", "conversation"]
TEXT_EXTENSIONS = ("txt", "json")
"""Parts that hold text; of a caption `.txt` goes first."""
HEADER = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n"
)
"""Opens every conversation (OneLLM's training header)."""
TURN = "### {speaker}: {value}\n"
STOP = "###"
"""Ends an answer; generation stops at it."""
SPEAKERS = {"human": "Human", "gpt": "Assistant", "assistant": "Assistant"}
FORMAT_VERSION = 1
"""Raise it when the tokens of either format change: the length sidecars made before are then no longer used."""
_MEDIA_TAG = "<image>"


class TextEncoder:
    """Texts to ids and labels for one tokenizer, format and length. Picklable, and untouched by other users of the tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer (PreTrainedTokenizerFast).
        text_format: `caption` or `conversation`.
        max_tokens: longer texts are cut to this many tokens.

    Raises:
        UsageError: the tokenizer is not a fast one, has no BOS or no EOS, or no such format.
    """

    def __init__(self, tokenizer: Any, text_format: TextFormat, max_tokens: int) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UsageError(
                f"the tokenizer ({type(tokenizer).__name__}) is not a fast one",
                "labels of conversations are found by the character offsets that only fast tokenizers give.",
                "save it as a tokenizer.json (PreTrainedTokenizerFast) beside the model.",
            )
        if text_format not in ("caption", "conversation"):
            raise UsageError(f"unknown text format {text_format!r}", "no such layout of text is known.", "use caption or conversation.")
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
        self._backend = _plain_copy(backend)
        identity = (self._backend.to_str(), self.bos, self.eos, text_format, max_tokens, FORMAT_VERSION)
        self.fingerprint = hashlib.sha256(repr(identity).encode("utf-8")).hexdigest()[:16]
        """Names everything that text lengths depend on, besides the text."""

    def encode(self, parts: Mapping[str, Part]) -> tuple[list[int], list[int]]:
        """Ids and labels (IGNORE where not supervised) of a sample's text parts, by extension; equal lengths, BOS first.

        Raises:
            SampleError: no text part, not UTF-8, not JSON, or not in this format.
        """
        ids, labels = self._caption(parts) if self.text_format == "caption" else self._conversation(parts)
        return ids[: self.max_tokens], labels[: self.max_tokens]

    def _caption(self, parts: Mapping[str, Part]) -> tuple[list[int], list[int]]:
        ids = [*self._backend.encode(caption_of(parts), add_special_tokens=False).ids, self.eos]
        return [self.bos, *ids], [IGNORE, *ids]

    def _conversation(self, parts: Mapping[str, Part]) -> tuple[list[int], list[int]]:
        text, answers = render_conversation(turns_of(parts))
        encoding = self._backend.encode(text, add_special_tokens=False)
        labels = [IGNORE] * len(encoding.ids)
        token = 0
        for start, end in answers:  # both lists are in order: one pass
            while token < len(labels) and encoding.offsets[token][1] <= start:
                token += 1
            while token < len(labels) and encoding.offsets[token][0] < end:
                labels[token] = encoding.ids[token]
                token += 1
        return [self.bos, *encoding.ids, self.eos], [IGNORE, *labels, IGNORE]


def encode(parts: Mapping[str, Part], tokenizer: Any, text_format: TextFormat, max_tokens: int) -> tuple[list[int], list[int]]:
    """`TextEncoder.encode` for one sample; keep a TextEncoder for many."""
    return _encoder(tokenizer, text_format, max_tokens).encode(parts)


@lru_cache(maxsize=4)
def _encoder(tokenizer: Any, text_format: TextFormat, max_tokens: int) -> TextEncoder:
    return TextEncoder(tokenizer, text_format, max_tokens)


def _plain_copy(backend: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation and padding (state that other callers leave), reading "</s>" in a caption as plain text."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def caption_of(parts: Mapping[str, Part]) -> str:
    """The caption: the `.txt` part, else `caption` of the `.json` part.

    Raises:
        SampleError: there is none, or it is not UTF-8 text.
    """
    if "txt" in parts:
        return _utf8(parts["txt"])
    caption = meta_of(parts).get("caption")
    if not isinstance(caption, str):
        raise SampleError(
            "no caption: the sample has neither a .txt part nor a string `caption` in its .json",
            "the caption format has nothing to train on.",
            "give it one, or use data.text_format=conversation.",
        )
    return caption


def meta_of(parts: Mapping[str, Part]) -> Mapping[str, Any]:
    """The `.json` part as a mapping; empty where there is none.

    Raises:
        SampleError: it is no JSON object in UTF-8.
    """
    if "json" not in parts:
        return {}
    try:
        meta = json.loads(_utf8(parts["json"]))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SampleError(f"its .json part is not JSON: {error}", "the sample cannot be read.", "build the dataset again.") from None
    if not isinstance(meta, dict):
        raise SampleError("its .json part is no JSON object", "captions and conversations are looked up in it.", "build the dataset again.")
    return meta


def turns_of(parts: Mapping[str, Part]) -> list[tuple[str, str]]:
    """(speaker, value) of each turn of `conversations` in the `.json` part; the media tag is taken out.

    Raises:
        SampleError: there are none, a turn is malformed, or nobody answers.
    """
    raw = meta_of(parts).get("conversations")
    if not isinstance(raw, list) or not raw:
        raise SampleError(
            "no `conversations` in the sample's .json", "the conversation format trains on answers.", "use data.text_format=caption."
        )
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(raw):
        speaker = SPEAKERS.get(str(turn.get("from", "")).lower()) if isinstance(turn, dict) else None
        value = turn.get("value") if isinstance(turn, dict) else None
        if speaker is None or not isinstance(value, str):
            raise SampleError(
                f"turn {number} of its conversation is not {{'from': 'human' | 'gpt', 'value': text}}",
                "speaker and text cannot be told.",
                "mend the dataset's source and build it again.",
            )
        turns.append((speaker, value.replace(_MEDIA_TAG, "").strip() if _MEDIA_TAG in value else value))
    if all(speaker != "Assistant" for speaker, _ in turns):
        raise SampleError("its conversation has no answer", "nothing in it would be supervised.", "leave the sample out of the dataset.")
    return turns


def render_conversation(turns: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and for each answer the characters [start, end) that are supervised.

    They begin at the space before the answer (many tokenizers join it to the first word, and generation goes on from
    "### Assistant:") and end behind the "###" that follows.
    """
    text, answers = HEADER, []
    for speaker, value in turns:
        turn = TURN.format(speaker=speaker, value=value)
        if speaker == "Assistant":
            answers.append((len(text) + len(f"{STOP} {speaker}:"), len(text) + len(turn) + len(STOP)))
        text += turn
    return text + f"{STOP} ", answers


def _utf8(part: Part) -> str:
    try:
        return part.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(
            f"its .{part.extension} part is not UTF-8: {error.reason} at byte {error.start}",
            "the text would be wrong in silence.",
            "convert the source to UTF-8 and build the dataset again.",
        ) from None
