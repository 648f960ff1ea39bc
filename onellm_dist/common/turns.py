"""The turns of a conversation: the one parser for dataset sources, the builder, the index and text.

A sample's `.json` part holds a conversation under `conversations`, in LLaVA's or ShareGPT's form:

    [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cube."}, ...]

`role` and `content` may stand for `from` and `value`, and `messages` for `conversations`. A key
that is null counts as absent: tables give every turn the keys of all. Content may be a list of
parts as OpenAI has them, `{"type": "text", "text": ...}`; media among them are left out where they
stand before the text anyway, and else become placeholders (`<image>`).
`"weight": 0` (OpenAI's) keeps an answer from being trained on.

A preference sample's conversation ends with a question, and `chosen` and `rejected` say what
follows it, once as it is preferred and once as it is not. Each is a turn or a list of turns that
begins with an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant"]

ROLES: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}
"""Speaker as datasets write it, in lower case, to its role (chatgpt, bard and bing: ShareGPT)."""


CONVERSATION_KEYS = ("conversations", "messages")
"""Keys under which a conversation stands, the first that has one first."""


PAIR_KEYS = ("chosen", "rejected")
"""Keys of the two continuations of a preference sample."""


class ConversationTurn(NamedTuple):
    """One turn of a conversation."""

    role: Role
    """Who speaks; `system` only in the first turn."""
    text: str
    """What is said, exactly as it is stored."""
    weight: int = 1
    """0 for an answer that is not trained on."""


_SPEAKER_KEYS, _TEXT_KEYS = ("from", "role"), ("value", "content")
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython", "tool_call")


class TurnsError(ValueError):
    """A conversation that cannot be used; the message says which turn and why."""


def find_conversation(meta: Mapping[str, Any]) -> Any:
    """Find the conversation of a sample or of a row of a dataset, for `parse_turns`.

    Returns:
        The value of the first of CONVERSATION_KEYS that is neither null nor an empty list; None:
        there is none.
    """
    return next((raw for k in CONVERSATION_KEYS if (raw := meta.get(k)) not in (None, [])), None)


def parse_turns(
    raw: Any, modalities: Collection[str], *, placeholders: bool = False
) -> list[ConversationTurn]:
    """Parse the value of `conversations`.

    Args:
        raw: the value.
        modalities: names of all modalities; content parts of other types are refused.
        placeholders: whether a medium among content parts becomes a placeholder in the text.

    Returns:
        The turns; at least one of them is an answer (role `assistant`).

    Raises:
        TurnsError: it is not a list of turns, a turn has no known speaker, no text or a content
            part that is neither text nor a medium, a later turn is a system turn, or there is no
            answer.
    """
    if not isinstance(raw, list):
        raise TurnsError(f"expected a list of turns, not {type(raw).__name__}")
    known = modalities, placeholders
    turns = [_parse_turn(number, turn, *known) for number, turn in enumerate(raw)]
    if all(turn.role != "assistant" for turn in turns):
        raise TurnsError("the conversation has no answer")
    return turns


def has_pair(meta: Mapping[str, Any]) -> bool:
    """Whether a sample is a preference sample: both continuations answer its last question.

    A conversation that ends with an answer is an ordinary sample, whatever else its `.json` says.
    """
    shared = find_conversation(meta)
    last = shared[-1] if isinstance(shared, list) else None
    if not isinstance(last, dict) or get_role(last) != "user":
        return False
    return all(isinstance(own := meta.get(key), dict | list) and own for key in PAIR_KEYS)


def get_role(turn: Mapping[str, Any]) -> Role | None:
    """Return the role of who speaks in a turn; None: a speaker that is not known."""
    return ROLES.get(_get_speaker(turn))


def _get_speaker(turn: Mapping[str, Any]) -> str:
    return str(_get_first(turn, *_SPEAKER_KEYS)).lower()


def get_said(turn: Mapping[str, Any]) -> Any:
    """Return what is said in a turn, a text or content parts; None: it has neither."""
    return _get_first(turn, *_TEXT_KEYS)


def _get_first(turn: Mapping[str, Any], *keys: str) -> Any:
    """The first value that is not null."""
    return next((value for key in keys if (value := turn.get(key)) is not None), None)


def find_contradiction(turn: Mapping[str, Any]) -> str | None:
    """Say how two keys of a turn contradict each other, as `from` and `role`; None: they do not."""
    speakers = [str(x).lower() for key in _SPEAKER_KEYS if (x := turn.get(key)) is not None]
    if len({ROLES.get(speaker, speaker) for speaker in speakers}) > 1:
        return f"is of two speakers, {' and '.join(map(repr, speakers))}"
    said = [x for key in _TEXT_KEYS if (x := turn.get(key)) is not None]
    if any(other != said[0] for other in said[1:]):
        return f"says two things, {' and '.join(f'{x!r:.40}' for x in said)}"
    return None


def parse_pair(
    meta: Mapping[str, Any], modalities: Collection[str], *, placeholders: bool = False
) -> tuple[list[ConversationTurn], list[ConversationTurn]]:
    """Parse a preference sample.

    Args:
        meta: the sample's `.json`.
        modalities: as of `parse_turns`.
        placeholders: as of `parse_turns`.

    Returns:
        The whole conversation as chosen, and as rejected. Answers of the turns that both share have
        weight 0: they are part of the prompt.

    Raises:
        TurnsError: a continuation is missing, `parse_turns` refuses a conversation, the shared
            turns do not end with a question, or a continuation does not begin with an answer.
    """
    shared = find_conversation(meta)
    if not isinstance(shared, list):
        raise TurnsError("a preference sample needs a list of turns that both answers follow")
    found = []
    for key in PAIR_KEYS:
        own = meta.get(key)
        if not isinstance(own, dict | list) or not own:
            raise TurnsError(f"`{key}` is neither a turn nor a list of turns")
        own = own if isinstance(own, list) else [own]
        turns = parse_turns([*shared, *own], modalities, placeholders=placeholders)
        before, after = turns[len(shared) - 1].role, turns[len(shared)].role
        if (before, after) != ("user", "assistant"):
            raise TurnsError(
                f"`{key}` begins with a turn of the {after} behind one of the {before}; an answer "
                "follows a question"
            )
        prompt = [turn._replace(weight=0) for turn in turns[: len(shared)]]
        found.append([*prompt, *turns[len(shared) :]])
    return found[0], found[1]


def parse_conversations(
    meta: Mapping[str, Any], modalities: Collection[str], *, placeholders: bool = False
) -> list[list[ConversationTurn]]:
    """Parse what a sample's `.json` has: no conversation, one, or both of a preference sample.

    Args:
        meta: the `.json`.
        modalities: as of `parse_turns`.
        placeholders: as of `parse_turns`.

    Raises:
        TurnsError: as of `parse_turns` and `parse_pair`.
    """
    raw = find_conversation(meta)
    if raw is None:
        return []
    if has_pair(meta):
        return [*parse_pair(meta, modalities, placeholders=placeholders)]
    return [parse_turns(raw, modalities, placeholders=placeholders)]


def _parse_turn(
    number: int, raw: Any, modalities: Collection[str], placeholders: bool
) -> ConversationTurn:
    fields = raw if isinstance(raw, dict) else {}
    if problem := find_contradiction(fields):
        raise TurnsError(f"turn {number} {problem}")
    speaker = _get_speaker(fields)
    if speaker in _TOOL_ROLES or fields.get("tool_calls") or fields.get("function_call"):
        raise TurnsError(
            f"turn {number} calls a tool or is a tool's answer, which no text format here can "
            "express exactly"
        )
    role = ROLES.get(speaker)
    text = _join_parts(number, get_said(fields), modalities, placeholders)
    if role is None or not isinstance(text, str):
        raise TurnsError(
            f'turn {number} is not {{"from": speaker, "value": text}} with the speaker '
            '"human" or "gpt" (in the first turn also "system")'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON may contain "\ud83d" alone; no tokenizer and no file accepts it.
        raise TurnsError(
            f"turn {number} is not valid text: half a surrogate pair, {text[error.start]!a}, "
            f"at character {error.start}"
        ) from None
    if role == "system" and number:
        raise TurnsError(f"turn {number} is a system turn, and only the first turn may be one")
    return ConversationTurn(role, text, _parse_weight(number, fields) if role == "assistant" else 1)


def _join_parts(number: int, content: Any, modalities: Collection[str], placeholders: bool) -> Any:
    """The text of content parts; other content as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts: list[str] = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and isinstance(text, str):
            texts.append(text)
        elif not _is_medium(kind, part, modalities):
            raise TurnsError(
                f"turn {number} has a content part of type {kind!r}; text can be read, and media: "
                f"{', '.join(modalities)}"
            )
        elif placeholders:
            texts.append(f"<{get_part_modality(kind)}>")
    return "".join(texts)


def _is_medium(kind: object, part: Mapping[str, Any], modalities: Collection[str]) -> bool:
    """A medium stands under the name of its type, `url` or `path`; or its place alone is given.

    Other types have such keys too, as a document has a `path`. Tables give all parts the same keys;
    those without a value do not count.
    """
    if not isinstance(kind, str) or get_part_modality(kind) not in modalities:
        return False
    keys = {key for key, value in part.items() if value is not None}
    return keys == {"type"} or not keys.isdisjoint({kind, "url", "path"})


def get_part_modality(kind: object) -> str:
    """Return the modality of a content part by its type: `image` of `image_url`, `input_image`."""
    return str(kind).removeprefix("input_").removesuffix("_url")


def _parse_weight(number: int, fields: Mapping[str, Any]) -> int:
    weight = 1 if fields.get("weight") is None else fields["weight"]
    if weight not in (0, 1):
        raise TurnsError(f"turn {number} has weight {weight!r}; an answer has weight 0 or 1")
    return int(weight)
