"""The turns that both answers of a preference follow, of several columns that each say some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.preference_turns import (
    ReadTurn,
    Turns,
    are_same,
    find_difference,
    get_speaker,
    is_same,
    is_text_of,
    pick_turn,
    quote_turn,
    read_turn,
    read_turns,
)


class PromptColumn(NamedTuple):
    """A column that says what is asked."""

    name: str
    """`conversations`; "" of what whole conversations begin with."""
    turns: Turns


def join_columns(columns: Sequence[PromptColumn], answers: Sequence[Turns]) -> Turns:
    """Join the columns of a prompt, each of which may lack turns that others have.

    Args:
        columns: the columns, one at least. They may continue to the end of either answer, as those
            of ultrafeedback do; a history of earlier turns does not.
        answers: what follows the prompt.

    Raises:
        BadSampleError: a column is neither part of those before it nor what precedes or follows
            them, could be both of two things, or ends with an answer of another weight.
        TurnsError: two keys of a turn contradict each other.
    """
    ends = [answer for answer in answers if answer]
    cut = [c if c.name in ("", "history") else _cut_answer(c, ends) for c in columns]
    shared = cut[0]
    for column in cut[1:]:
        shared = PromptColumn(shared.name, _join(column, shared))
    return shared.turns


def _cut_answer(column: PromptColumn, answers: Sequence[Turns]) -> PromptColumn:
    """The column without an answer at its end.

    Raises:
        BadSampleError: one of the two is trained on, and the other is not.
    """
    asked = read_turns(column.turns)
    for answer in answers:
        count = len(asked) - len(answer)
        if count > 0 and are_same(asked[count:], read_turns(answer)):
            if quotes := find_difference(column.turns[count:], answer):
                raise BadSampleError(
                    f"answers: {column.name} has {quotes[0]} where the answer is {quotes[1]}"
                )
            return column._replace(turns=column.turns[:count])
    return column


def _join(prompt: PromptColumn, shared: PromptColumn) -> Turns:
    """The shared turns, with those of another column that they lack.

    Raises:
        BadSampleError: as of `join_columns`.
    """
    first, end = (get_speaker(prompt.turns[i]) for i in (0, -1))
    shared_first, shared_end = (get_speaker(shared.turns[i]) for i in (0, -1))
    may_follow = bool(shared.name) and (shared_end, end) != ("user", "assistant")
    joined = _overlay(prompt, shared, may_follow=may_follow)
    if joined is not None:
        return joined
    if _repeat(read_turns(prompt.turns), read_turns(shared.turns)):
        raise _make_error(prompt, shared)
    is_open = shared_end == "system" or (may_follow and (shared_end, end) == ("assistant", "user"))
    if shared.name and first == "user" and is_open:
        return [*shared.turns, *prompt.turns]
    # A system turn stays the first, and earlier turns follow it.
    lead = shared.turns[:1] if (shared_first, first) == ("system", "user") else []
    rest = shared.turns[len(lead) :]
    precedes = end == "system" or (end, shared_end) == ("assistant", "user")
    if precedes and rest and get_speaker(rest[0]) == "user":
        return [*lead, *prompt.turns, *rest]
    raise _make_error(prompt, shared)


def _overlay(prompt: PromptColumn, shared: PromptColumn, *, may_follow: bool) -> Turns | None:
    """The shared turns, with those of the prompt around them; None: the two have no turn in common.

    Raises:
        BadSampleError: the turns in common may be either of several.
    """
    asked, said = read_turns(prompt.turns), read_turns(shared.turns)
    parts, overlaps, is_repeated = list[Turns](), list[Turns](), False
    for place in range(1 - len(asked), len(said)):
        before, start = max(-place, 0), max(place, 0)
        count = min(len(asked) - before, len(said) - start)
        after = len(asked) - before - count
        if after and not may_follow:
            continue
        common = zip(asked[before : before + count], said[start : start + count], strict=True)
        if not all(_fits(*pair, shared) for pair in common):
            continue
        picked = map(pick_turn, shared.turns[start:], prompt.turns[before : before + count])
        joined = [
            *prompt.turns[:before],
            *shared.turns[:start],
            *picked,
            *shared.turns[start + count :],
            *prompt.turns[before + count :],
        ]
        lacking = [*asked[:before], *asked[before + count :]]
        own = [*said[:start], *said[start + count :]]
        is_repeated |= _repeat(lacking, said) or _repeat(own, asked)
        (overlaps if lacking and own else parts).append(joined)
    found = parts or overlaps  # where one is part of the other, nothing is said twice
    if is_repeated and not parts:
        raise _make_error(prompt, shared)
    if any(not are_same(read_turns(found[0]), read_turns(other)) for other in found[1:]):
        raise BadSampleError(
            f"prompt: {prompt.name} has turns of {shared.name or 'both conversations'} in several "
            f"places ({quote_turn(prompt.turns[0])}), and which it means is not clear"
        )
    return found[0] if found else None


def _fits(asked: ReadTurn, said: ReadTurn, shared: PromptColumn) -> bool:
    """Whether two turns are one; a column may have it without its media.

    Whole conversations have theirs: what they do not show, the answers are not about.
    """
    if is_same(asked, said) or is_text_of(asked, said):
        return True
    return bool(shared.name) and is_text_of(said, asked)


def _repeat(first: Sequence[ReadTurn], second: Sequence[ReadTurn]) -> bool:
    """Whether a question stands on both sides of a join: they would contradict each other."""
    return any(_list_common(first, second))


def _list_common(
    first: Sequence[ReadTurn], second: Sequence[ReadTurn]
) -> Iterator[tuple[int, int]]:
    for i, one in enumerate(first):
        for k, other in enumerate(second):
            if one.speaker == "user" and (
                is_same(one, other) or is_text_of(one, other) or is_text_of(other, one)
            ):
                yield i + 1, k + 1


def _make_error(prompt: PromptColumn, shared: PromptColumn) -> BadSampleError:
    """The error that quotes where two columns differ: behind a question of both, or in the end."""
    beside = shared.name or "both answers' conversations"
    asked, said = read_turns(prompt.turns), read_turns(shared.turns)
    systems = [(0, 0)] if asked[0].speaker == said[0].speaker == "system" else []
    for i, k in (*systems, *_list_common(asked, said)):
        pairs = zip(prompt.turns[i:], shared.turns[k:], strict=False)
        differ = (pair for pair in pairs if not is_same(*map(read_turn, pair)))
        if (pair := next(differ, None)) is not None:
            return BadSampleError(
                f"prompt: {prompt.name} has {quote_turn(pair[0])} where {beside} "
                f"{'has' if shared.name else 'have'} {quote_turn(pair[1])}"
            )
    where = f"{beside} ends with {quote_turn(shared.turns[-1])}"
    place = "it nor what precedes or follows it"
    if not shared.name:
        where = f"{beside} begin with {quote_turn(shared.turns[0])}"
        place = "them nor what precedes them"
    return BadSampleError(
        f"prompt: {prompt.name} ends with {quote_turn(prompt.turns[-1])}, and {where}: the prompt "
        f"is neither part of {place}"
    )


def add_system(turns: Turns, system: object) -> Turns:
    """Begin a prompt with the column `system`.

    Raises:
        BadSampleError: it is not a text, or the prompt has another system turn.
    """
    if not isinstance(system, str):
        raise BadSampleError(f"unreadable row: system is {system!r:.60}, not a text")
    own = {"role": "system", "content": system}
    if not turns or get_speaker(turns[0]) != "system":
        return [own, *turns]
    if not is_same(read_turn(own), read_turn(turns[0])):
        raise BadSampleError(
            f"system: the column system is {system.strip()!r:.60}, and the conversation begins "
            f"with {quote_turn(turns[0])}"
        )
    return turns
