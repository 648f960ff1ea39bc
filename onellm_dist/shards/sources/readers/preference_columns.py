"""The columns of a preference row that hold its prompt, and those that hold its two answers.

A row may have its answers in several forms at once (ultrafeedback beside ms-swift's columns). They
must be the same pair then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from onellm_dist.common.turns import (
    CONVERSATION_KEYS,
    PAIR_KEYS,
    TurnsError,
    find_contradiction,
    get_said,
)
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.preference_prompts import PromptColumn
from onellm_dist.shards.sources.readers.preference_turns import (
    Turns,
    find_difference,
    get_speaker,
    is_given,
    is_whole,
    make_turns,
    split_common,
)

_RESPONSES = ("rejected_messages", "rejected_response")
"""ms-swift's columns of the rejected answer; the chosen one ends the conversation."""
_OUTPUTS = ("output_1", "output_2")
"""LLaVA-RLHF's columns of answers."""
_BOTH_OUTPUTS = " and ".join(_OUTPUTS)
_ANSWERS = (*PAIR_KEYS, *_RESPONSES, *_OUTPUTS)
_ANSWERED = ("messages", "conversations", "prompt")
"""Columns that may hold the chosen answer beside ms-swift's rejected one, its own name first."""


class AnswerPair(NamedTuple):
    """Two answers, and what they follow as far as the same columns say it."""

    name: str
    """The columns."""
    shared: Turns
    """What two whole conversations begin with; [] of answers alone."""
    chosen: Turns
    rejected: Turns
    used: str = ""
    """The column of the prompt that is one of the whole conversations."""


def find_answers(
    row: Mapping[str, Any], prompts: Sequence[PromptColumn]
) -> tuple[AnswerPair, list[PromptColumn], list[Turns]]:
    """Find a row's answers, and what is left to join to its prompt.

    Args:
        row: the row.
        prompts: its columns of the prompt.

    Returns:
        The pair; the columns of the prompt; and the answers at which those may end.

    Raises:
        BadSampleError: there is no pair, or two forms of it differ.
        TurnsError: two keys of a turn contradict each other.
    """
    pairs = list(_list_pairs(row, prompts))
    if not pairs:
        if any(row.get(key) is not None and not is_given(row[key]) for key in _ANSWERS):
            raise BadSampleError("answers: one of them is empty")
        if not prompts and any(is_given(row.get(key)) for key in _RESPONSES):
            raise BadSampleError("unreadable row: the row has no prompt")
        raise BadSampleError("unreadable row: it has no chosen and rejected answer")
    pair = next((pair for pair in pairs if pair.shared), pairs[0])
    _compare_pairs(row, pair, pairs)
    left = [column for column in prompts if column.name != pair.used]
    left += [PromptColumn(p.name, p.shared) for p in pairs if p is not pair and p.shared]
    answers = [pair.chosen, pair.rejected]
    has_outputs = any(other.name == _BOTH_OUTPUTS for other in pairs)
    if has_outputs and left and left[0].name in CONVERSATION_KEYS:
        first = left[0].turns
        if len(first) > 1 and get_speaker(first[-1]) == "assistant":
            answers.append(first[-1:])  # the outputs take its place
    return pair, left, answers


def _compare_pairs(row: Mapping[str, Any], pair: AnswerPair, pairs: Sequence[AnswerPair]) -> None:
    """Compare the other forms of a row's answers with the one that is taken.

    Raises:
        BadSampleError: they differ, or a column of an answer stands alone.
    """
    for other in pairs:
        if other is pair:  # a weight of NaN differs from itself
            continue
        for key in PAIR_KEYS:
            quotes = find_difference(getattr(pair, key), getattr(other, key))
            if quotes is not None:
                raise BadSampleError(
                    f"answers: the {key} one of {pair.name} is {quotes[0]}, that of {other.name} "
                    f"is {quotes[1]}"
                )
    said = " ".join(other.name for other in pairs).split()
    alone = [k for k in _ANSWERS if is_given(row.get(k)) and k not in said]
    if alone:
        raise BadSampleError(f"answers: {alone[0]} stands alone beside {pair.name}")


def _list_pairs(row: Mapping[str, Any], prompts: Sequence[PromptColumn]) -> Iterator[AnswerPair]:
    """Yield the pair of each form that the row has."""
    given = {key: make_turns(row.get(key), "assistant") for key in (*PAIR_KEYS, *_RESPONSES)}
    chosen = given.pop("chosen")
    rejected = {key: turns for key, turns in given.items() if turns}
    for key, turns in rejected.items() if chosen else ():
        yield _make_pair("chosen", chosen, key, turns)
    named = {column.name: column.turns for column in prompts}
    whole = next((k for k in _ANSWERED if get_speaker(named.get(k, [None])[-1]) == "assistant"), "")
    if whole and any(key in rejected for key in _RESPONSES):
        for key, turns in rejected.items():
            yield _make_pair(whole, named[whole], key, turns)._replace(used=whole)
    if all(is_given(row.get(key)) for key in _OUTPUTS):
        yield AnswerPair(_BOTH_OUTPUTS, [], *_rank_outputs(row))
    if said := _read_text(row):
        better, worse = (make_turns(said[key], "assistant") for key in PAIR_KEYS)
        yield AnswerPair("text", [], better, worse)


def _make_pair(first: str, chosen: Turns, second: str, rejected: Turns) -> AnswerPair:
    """The pair of two columns."""
    name = f"{first} and {second}"
    is_pair = (first, second) == PAIR_KEYS
    if (
        is_whole(chosen) and not is_whole(rejected) and not is_pair
    ):  # it takes the place of the last
        rejected = [*chosen[:-1], *rejected]
    if is_whole(chosen) and is_whole(rejected):
        return AnswerPair(name, *split_common(chosen, rejected))
    return AnswerPair(name, [], chosen, rejected)


def _rank_outputs(row: Mapping[str, Any]) -> tuple[Turns, Turns]:
    """LLaVA-RLHF's two outputs, the better one first."""
    better = row.get("preference")
    if isinstance(better, bool) or better not in (1, 2):
        raise BadSampleError(f"unreadable row: preference is {better!r:.40}, neither 1 nor 2")
    better = int(better)  # pandas writes whole numbers as floats where one is missing
    return _make_output(row, _OUTPUTS[better - 1]), _make_output(row, _OUTPUTS[2 - better])


def _make_output(row: Mapping[str, Any], key: str) -> Turns:
    """The answer of a text, or of a turn of whoever answered (LLaVA-RLHF: `llava`)."""
    output = row[key]
    turn = output if isinstance(output, dict) else {"content": output}
    if problem := find_contradiction(turn):
        raise TurnsError(f"{key} {problem}")
    text = get_said(turn)
    if not isinstance(text, str):
        raise BadSampleError(f"unreadable row: {key} is {output!r:.60}, neither a text nor a turn")
    more = {k: turn[k] for k in ("weight", "tool_calls", "function_call") if k in turn}
    return [{"role": "assistant", "content": text, **more}]


def _read_text(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the JSON in `text` says (RLHF-V); None: it is another text."""
    text = row.get("text")
    try:
        said = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not all(is_given(said.get(key)) for key in PAIR_KEYS):
        return None
    return said


def list_prompts(row: Mapping[str, Any]) -> list[PromptColumn]:
    """List the columns that say what is asked, with their turns.

    Raises:
        BadSampleError: the history or the instruction cannot be read.
    """
    found = {key: row.get(key) for key in (*CONVERSATION_KEYS, "prompt", "question")}
    if said := _read_text(row):
        found["text"] = said.get("question")
    prompts = [
        PromptColumn(key, make_turns(value, "user"))
        for key, value in found.items()
        if is_given(value)
    ]
    earlier = _read_history(row)
    asked = {k: text for k in ("instruction", "input") if (text := _read_field(row, k)).strip()}
    if asked:
        turn = {"role": "user", "content": "\n".join(asked.values())}
        return [*prompts, PromptColumn(next(iter(asked)), [*earlier, turn])]
    return [*prompts, PromptColumn("history", earlier)] if earlier else prompts


def _read_field(row: Mapping[str, Any], key: str) -> str:
    """The text of a field; of a number its digits.

    Raises:
        BadSampleError: it is neither.
    """
    value = row.get(key)
    if isinstance(value, str) or not is_given(value):
        return value or ""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadSampleError(f"unreadable row: {key} is {value!r:.60}, neither text nor a number")
    return str(value)


def _read_history(row: Mapping[str, Any]) -> Turns:
    """The turns of LLaMA-Factory's pairs of a question and its answer.

    Raises:
        BadSampleError: it is something else.
    """
    history = row.get("history")
    if not is_given(history):
        return []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise BadSampleError(
            f"unreadable row: history is not a list of pairs of texts: {history!r:.60}"
        )
    return [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
