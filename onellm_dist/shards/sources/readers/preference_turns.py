"""Turns of preference rows, compared however they are written.

The text `<image> Why?` says the same as the content parts `{"type": "image"}` and
`{"type": "text", "text": "Why?"}`; a part may hold its medium besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from onellm_dist.common.turns import (
    Role,
    TurnsError,
    find_contradiction,
    get_part_modality,
    get_role,
    get_said,
)
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.media_rows import normalise_tags
from onellm_dist.shards.sources.readers.unread_media import get_part_medium

Turns = list[dict[str, Any]]
ALIKE = "answers: chosen and rejected are the same"


class ReadTurn(NamedTuple):
    """Who says what in a turn, in one form for all ways to write it."""

    speaker: Role | None
    said: Any
    """Text with one form of placeholders; anything else as it is."""
    media: tuple[Any, ...]
    """What the content part of each placeholder holds; None: nothing, or there is no part."""
    calls: tuple[Any, ...]
    """Calls of tools."""
    weight: Any = 1
    """0: an answer that is not trained on; 1: a trained one, and other turns."""

    @property
    def text(self) -> Any:
        """What is said without the places of media."""
        if not isinstance(self.said, str):
            return self.said
        return " ".join(normalise_tags(self.said, "\n")[0].split())

    @property
    def held(self) -> int:
        """How many content parts hold a medium."""
        return sum(medium is not None for medium in self.media)


def read_turn(turn: Any) -> ReadTurn:
    """Read a turn; what is not a turn is what is said by nobody.

    Raises:
        TurnsError: two keys of the turn contradict each other.
    """
    if not isinstance(turn, dict):
        return ReadTurn(None, turn, (), ())
    if problem := find_contradiction(turn):
        raise TurnsError(f"a turn {problem}")
    said, media = _read_content(get_said(turn))
    calls = tuple(turn.get(key) or None for key in ("tool_calls", "function_call"))
    speaker, weight = get_role(turn), turn.get("weight")
    is_weighted = speaker == "assistant" and weight is not None
    return ReadTurn(speaker, said, media, calls, weight if is_weighted else 1)


def read_turns(turns: Turns) -> list[ReadTurn]:
    """Read turns one by one, as `read_turn`."""
    return [read_turn(turn) for turn in turns]


def _read_content(said: Any) -> tuple[Any, tuple[Any, ...]]:
    """What is said, and what its placeholders hold."""
    if isinstance(said, str):
        text, count = normalise_tags(said)
        return text, (None,) * count
    if not isinstance(said, list) or not all(isinstance(part, dict) for part in said):
        return said, ()
    pieces, media = list[str](), list[Any]()
    for part in said:
        kind, text = part.get("type"), part.get("text")
        if kind == "text":
            pieces.append(str(text or ""))
            media += [None] * normalise_tags(pieces[-1])[1]
        elif isinstance(kind, str) and get_part_modality(kind) in all_modalities():
            pieces.append(f"<{get_part_modality(kind)}>")
            media.append(get_part_medium(part))
        else:  # a document, say: whoever parses the turns refuses it
            return _drop_nulls(said), ()
    text, count = normalise_tags("".join(pieces))
    if count != len(media):  # a placeholder in two halves: which part holds what is not clear
        return _drop_nulls(said), ()
    return text, tuple(media)


def _drop_nulls(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in part.items() if v is not None} for part in parts]


def is_same(first: ReadTurn, second: ReadTurn) -> bool:
    """Check that two turns say the same, of the same media as far as they hold them.

    Weights do not count: no answer of a prompt is trained on, whatever it has.
    """
    if (first.speaker, first.said, first.calls) != (second.speaker, second.said, second.calls):
        return False
    less, more = sorted((first, second), key=lambda turn: turn.held)
    return all(a is None or a == b for a, b in zip(less.media, more.media, strict=True))


def are_same(first: Sequence[ReadTurn], second: Sequence[ReadTurn]) -> bool:
    """Check that all turns say the same, as `is_same`."""
    return len(first) == len(second) and all(map(is_same, first, second))


def find_difference(first: Turns, second: Turns) -> tuple[str, str] | None:
    """Quote the turns in which two forms of an answer first differ; None: they are the same.

    They differ also where one is trained on and the other is not.

    Raises:
        TurnsError: two keys of a turn contradict each other.
    """
    one, other = read_turns(first), read_turns(second)
    for i in range(max(len(one), len(other))):
        pair = one[i : i + 1], other[i : i + 1]
        if not are_same(*pair) or pair[0][0].weight != pair[1][0].weight:
            mine, its = (quote_turn(t[i]) if i < len(t) else "missing" for t in (first, second))
            return mine, its
    return None


def is_text_of(first: ReadTurn, second: ReadTurn) -> bool:
    """Check that the first of two turns is the second without its media."""
    if (first.speaker, first.calls) != (second.speaker, second.calls):
        return False
    return not first.media and bool(second.media) and first.text == second.text


def pick_turn(first: Any, second: Any) -> Any:
    """Choose of two turns that say the same the one that has more of the media."""

    def count(turn: Any) -> tuple[int, int]:
        read = read_turn(turn)
        return read.held, len(read.media)

    return second if count(second) > count(first) else first


def get_speaker(turn: Any) -> Role | None:
    """Return who speaks in a turn; None: nobody that is known."""
    return get_role(turn) if isinstance(turn, dict) else None


def is_whole(turns: Turns) -> bool:
    """Check that turns begin as a conversation does, and not with an answer."""
    return bool(turns) and get_speaker(turns[0]) in ("user", "system")


def is_given(value: Any) -> bool:
    """Check that a column has a value: neither null nor empty."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value not in ([], {})


def make_turns(value: Any, role: str) -> Turns:
    """Turns as they are; a turn alone, or a text, as a list; nothing of no value."""
    if not is_given(value):
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else [value]


def quote_turn(turn: Any) -> str:
    """Who says what, cut, for a message."""
    if not isinstance(turn, Mapping):
        return f"{turn!r:.60}"
    read = read_turn(turn)
    held = [medium for medium in read.media if isinstance(medium, str)]
    named = f" ({', '.join(held):.60})" if held else ""
    weight = "" if read.weight == 1 else f" (weight {read.weight!r:.20})"
    return f"{read.speaker}: {read.said!r:.50}{named}{weight}"


def split_common(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Take off the turns that two whole conversations begin with.

    Raises:
        BadSampleError: they are the same, or begin with different turns.
        TurnsError: two keys of a turn contradict each other.
    """
    first, second = read_turns(chosen), read_turns(rejected)
    if are_same(first, second):
        raise BadSampleError(ALIKE)
    count = 0
    while count < min(len(first), len(second)) and is_same(first[count], second[count]):
        count += 1
    if count:
        shared = list(map(pick_turn, chosen[:count], rejected[:count]))
        return shared, chosen[count:], rejected[count:]
    alone = all(turns and get_speaker(turns[0]) == "assistant" for turns in (chosen, rejected))
    if alone or not chosen or not rejected:
        raise BadSampleError("unreadable row: the row has no prompt")
    raise BadSampleError(
        "unreadable row: chosen and rejected begin with different turns: "
        f"{quote_turn(chosen[0])}, and {quote_turn(rejected[0])}"
    )
