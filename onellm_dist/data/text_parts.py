"""What the text parts of a sample say: its `.json` object, captions and conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onellm_dist.common.errors import SampleError
from onellm_dist.common.turns import (
    ConversationTurn,
    TurnsError,
    find_conversation,
    has_pair,
    parse_pair,
    parse_turns,
)
from onellm_dist.modalities import Part, all_modalities

_MEDIA_TAG = "<image>"


def read_meta(parts: Mapping[str, Part]) -> Mapping[str, Any]:
    """Return the `.json` part as a mapping; empty if there is none.

    Raises:
        SampleError: the part is not a JSON object in UTF-8.
    """
    if "json" not in parts:
        return {}
    try:
        meta = json.loads(_decode_utf8(parts["json"]))
    except (ValueError, RecursionError) as error:  # ValueError: also integers of over 4300 digits
        raise SampleError(
            f"its .json part is not JSON: {error}",
            "the sample cannot be read.",
            "build the dataset again.",
        ) from None
    if not isinstance(meta, dict):
        raise SampleError(
            f"its .json part is not a JSON object but {type(meta).__name__}",
            "captions and conversations are looked up in it.",
            "build the dataset again.",
        )
    return meta


def read_caption(parts: Mapping[str, Part]) -> str:
    """Return the caption of a sample; of several captions, the first (see `read_captions`)."""
    return read_captions(parts)[0]


def read_captions(parts: Mapping[str, Part]) -> list[str]:
    """Return the captions of a sample, at least one.

    They are the `.txt` part or else `caption` or `captions` of the `.json` part, which may be a
    string or a list of strings.

    Raises:
        SampleError: there is no caption, or one is not valid text.
    """
    if "txt" in parts:
        return [_decode_utf8(parts["txt"])]
    meta = read_meta(parts)
    caption = meta.get("caption", meta.get("captions"))
    captions = caption if isinstance(caption, list) else [caption]
    if not captions or not all(isinstance(one, str) for one in captions):
        raise SampleError(
            "no caption: the sample has neither a .txt part nor a string (or a list of strings) "
            "`caption` in its .json",
            "the caption format has nothing to train on.",
            "add a caption, or use data.text_format=conversation.",
        )
    for one in captions:
        _require_valid(one)
    return captions


def read_turns(parts: Mapping[str, Part], *, placeholders: bool = False) -> list[ConversationTurn]:
    """Return the turns of the conversation in the `.json` part.

    Args:
        parts: the sample's text parts.
        placeholders: whether the turns keep the tag `<image>`, and media among content parts
            become such tags; else neither leaves a trace.

    Raises:
        SampleError: there is no conversation, `parse_turns` refuses it, or it is the prompt of two
            answers.
    """
    meta = read_meta(parts)
    raw = find_conversation(meta)
    if has_pair(meta):
        raise SampleError(
            "it is a preference sample: `chosen` and `rejected` answer its conversation",
            "one answer alone is trained on here.",
            "train with train.loss=dpo and data.preference_pairs=true, or build the dataset with "
            "one of the answers in its conversations.",
        )
    if raw is None:
        raise SampleError(
            "no `conversations` (or `messages`) in the sample's .json",
            "the conversation and chat formats train on answers.",
            "use data.text_format=caption.",
        )
    try:
        turns = parse_turns(raw, all_modalities(), placeholders=placeholders)
    except TurnsError as error:
        raise _explain_turns(error) from None
    return turns if placeholders else _remove_tags(turns)


def read_pair(
    parts: Mapping[str, Part], *, placeholders: bool = False
) -> tuple[list[ConversationTurn], list[ConversationTurn]]:
    """Return the conversation of a preference sample as chosen, and as rejected.

    Args:
        parts: the sample's text parts.
        placeholders: as of `read_turns`.

    Raises:
        SampleError: it is not a preference sample, or `parse_pair` refuses it.
    """
    meta = read_meta(parts)
    if not has_pair(meta):
        raise SampleError(
            "not a preference sample: its conversation does not end with a question that `chosen` "
            "and `rejected` (turns, or lists of turns) answer",
            "train.loss=dpo compares two answers.",
            "build the dataset from preferences (onellm shards build preferences), or use another "
            "train.loss without data.preference_pairs.",
        )
    try:
        chosen, rejected = parse_pair(meta, all_modalities(), placeholders=placeholders)
    except TurnsError as error:
        raise _explain_turns(error) from None
    if placeholders:
        return chosen, rejected
    return _remove_tags(chosen), _remove_tags(rejected)


def _explain_turns(error: TurnsError) -> SampleError:
    return SampleError(
        f"malformed conversations: {error}",
        "the sample has no text in this format.",
        "fix the dataset's source and build it again.",
    )


def _remove_tags(turns: list[ConversationTurn]) -> list[ConversationTurn]:
    return [turn._replace(text=_without_tag(turn.text)) for turn in turns]


def _without_tag(text: str) -> str:
    return text.replace(_MEDIA_TAG, "").strip() if _MEDIA_TAG in text else text


def _require_valid(text: str) -> None:
    """Refuse half a surrogate pair, which JSON can contain but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            f"its caption is not valid text: half a surrogate pair, {text[error.start]!a}, "
            f"at character {error.start}",
            "no tokenizer accepts it.",
            "fix the dataset's source and build it again.",
        ) from None


def _decode_utf8(part: Part) -> str:
    try:
        return part.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(
            f"its .{part.extension} part is not UTF-8: {error.reason} at byte {error.start}",
            "decoding it another way could give the wrong text without anyone noticing.",
            "convert the source to UTF-8 and build the dataset again.",
        ) from None
