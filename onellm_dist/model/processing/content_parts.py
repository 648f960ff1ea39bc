"""Conversations with media in their turns, as transformers and OpenAI write them.

A turn's content is a text, or a list of parts: `{"type": "text", "text": ...}` and media. A medium
is named by its modality, alone or as OpenAI does, and stands under the name of its type or under
`url`, `path`, `base64` or `data`:

    {"type": "image", "path": "x.jpg"}
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
    {"type": "input_audio", "input_audio": {"data": "...", "format": "wav"}}
    {"type": "onellm", "modality": "imu", "data": "..."}

`data` and `base64` are files in base64. `parts` stands for `data` where a medium is read from
several files: `{"type": "onellm", "modality": "depth", "parts": {"depth": ..., "image": ...}}`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.placeholders import make_mark, mark_placeholders
from onellm_dist.common.turns import ROLES, ConversationTurn
from onellm_dist.modalities import all_modalities

OWN_TYPE = "onellm"
"""Type of the parts that name their modality."""
_PLACES = ("url", "path", "base64", "data", "parts")


class HeldMedium(NamedTuple):
    """A medium of a conversation."""

    modality: str
    item: Any
    """A path or URL as text, the bytes of a file, or what a program holds."""


class Conversation(NamedTuple):
    """A conversation, and its media in the order in which they stand in it."""

    turns: list[ConversationTurn]
    media: list[HeldMedium]


def read_conversation(messages: Sequence[Any], *, marks: bool = False) -> Conversation:
    """Separate a conversation's texts from its media.

    Args:
        messages: mappings with `role` and `content`.
        marks: whether a mark (`placeholders.make_mark`) stands in the texts for each medium.

    Raises:
        UsageError: a message has no known role or content, or a part cannot be read.
    """
    turns: list[ConversationTurn] = []
    media: list[HeldMedium] = []
    for number, message in enumerate(messages):
        fields = message if isinstance(message, Mapping) else {}
        role, content = ROLES.get(str(fields.get("role")).lower()), fields.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role is None or not isinstance(parts, list | tuple) or not parts:
            raise _make_error(
                f"message {number} has role {fields.get('role')!r} and content of type "
                f"{type(content).__name__}",
                'give {"role": "user", "content": TEXT OR LIST OF PARTS}; roles are system, user '
                "and assistant.",
            )
        if role == "system" and number:
            raise _make_error(
                f"message {number} is a system message", "only the first message may be one."
            )
        texts = []
        for part in parts:
            found = _read_part(number, part)
            if isinstance(found, str):
                if marks:
                    _refuse_marks(number, found)
                texts.append(found)
            else:
                media.append(found)
                texts += [make_mark(found.modality)] * marks
        turns.append(ConversationTurn(role, _check_text(number, "".join(texts))))
    if not turns:
        raise _make_error("the conversation has no messages", "give at least a question.")
    return Conversation(turns, media)


def _refuse_marks(number: int, text: str) -> None:
    """Refuse a text with characters of a mark: it would be read as a medium."""
    try:
        mark_placeholders(text, ())
    except SampleError as error:
        what = error.what.replace("its text", f"message {number}")
        raise _make_error(what, error.do) from None


def _check_text(number: int, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _make_error(
            f"message {number} is not valid text: half a surrogate pair, {text[error.start]!a}",
            "remove it.",
        ) from None
    return text


def _read_part(number: int, part: Any) -> str | HeldMedium:
    """The text or the medium of a part."""
    fields = part if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    if kind in ("text", "input_text") and isinstance(fields.get("text"), str):
        return str(fields["text"])
    name = _name_modality(fields)
    if name is None:
        raise _make_error(
            f"message {number} has a content part of type {kind!r}",
            f"give text, or a medium of {', '.join(all_modalities())}.",
        )
    held = fields.get(kind) if kind in fields else fields
    item = _read_item(number, name, held)
    if item is None:
        raise _make_error(
            f"message {number} has a part of type {kind!r} without a medium",
            f"put it under {kind!r}, or under one of: {', '.join(_PLACES)}.",
        )
    return HeldMedium(name, item)


def _name_modality(fields: Mapping[str, Any]) -> str | None:
    kind = fields.get("type")
    name = fields.get("modality") if kind == OWN_TYPE else kind
    if not isinstance(name, str):
        return None
    if kind != OWN_TYPE:
        name = name.removeprefix("input_").removesuffix("_url")
    return name if name in all_modalities() else None


def _read_item(number: int, name: str, held: Any) -> Any:
    """What stands in a part: a file's bytes, a path or URL, or an object."""
    if not isinstance(held, Mapping):
        return held
    for key in ("base64", "data"):
        if isinstance(held.get(key), str):
            return decode_base64(number, name, held[key])
    parts = held.get("parts")
    if isinstance(parts, Mapping):
        return {
            str(role): decode_base64(number, name, data) if isinstance(data, str) else data
            for role, data in parts.items()
        }
    found = next((held[key] for key in ("url", "path") if isinstance(held.get(key), str)), None)
    if found is None and "type" not in held:
        return held  # a mapping that the modality itself reads
    return found


def decode_base64(number: int, name: str, data: str) -> bytes:
    """The bytes of a medium.

    Args:
        number: number of the message, for the error.
        name: the modality, for the error.
        data: base64, as RFC 4648 has it; or a `data:` URL.

    Raises:
        UsageError: it is not base64.
    """
    if data[:5].lower() == "data:":
        data = data.partition(",")[2]
    try:
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise _make_error(
            f"message {number}: its {name} is not base64: {error}",
            "encode the file's bytes as RFC 4648 has it.",
        ) from None


def _make_error(what: str, do: str) -> UsageError:
    return UsageError(what, "the model would not read what was meant.", do)
