"""What the text parts of a sample say: its `.json` object, captions and conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onellm_dist.common.errors import SampleError
from onellm_dist.common.turns import ConversationTurn, TurnsError, find_conversation, parse_turns
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
        SampleError: there is no conversation, or `parse_turns` refuses it.
    """
    raw = find_conversation(read_meta(parts))
    if raw is None:
        raise SampleError(
            "no `conversations` (or `messages`) in the sample's .json",
            "the conversation and chat formats train on answers.",
            "use data.text_format=caption.",
        )
    try:
        turns = parse_turns(raw, all_modalities(), placeholders=placeholders)
    except TurnsError as error:
        raise SampleError(
            f"malformed conversations: {error}",
            "the sample has no text in this format.",
            "fix the dataset's source and build it again.",
        ) from None
    if placeholders:
        return turns
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
