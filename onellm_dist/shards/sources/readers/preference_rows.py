"""Rows of preferences, in the forms in which data for DPO has them.

| form | prompt | answers |
|---|---|---|
| ours, LLaMA-Factory (sharegpt) | `conversations`, `messages` | `chosen`, `rejected`: turns, text |
| LLaMA-Factory (alpaca) | `instruction`, `input`, `history` | `chosen`, `rejected`: text |
| TRL, explicit | `prompt`: turns or text | `chosen`, `rejected`: turns or text |
| TRL, implicit; ultrafeedback_binarized | what both begin with | whole conversations |
| ms-swift | `messages` with the answer | `rejected_response`: text; `rejected_messages` |
| LLaVA-RLHF | `conversations` with an answer | `output_1`, `output_2`; `preference`: 1 or 2 |
| RLAIF-V | `question` | `chosen`, `rejected`: text |
| RLHF-V | `text`: JSON of the three | |

Of whole conversations the row's prompt, where it has one, must be part of what both begin with, or
precede it. Of several columns of the prompt each must be part of the others, or precede or follow
them. The column `system` is the system turn of a prompt that has none. Both answers are about
the same media: names of files, or bytes in tables (ultrafeedback_binarized, RLAIF-V and RLHF-V are
parquet).

A sample's `.json` has `conversations` (the shared turns), `chosen` and `rejected` (turns).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from onellm_dist.common.turns import (
    CONVERSATION_KEYS,
    PAIR_KEYS,
    ConversationTurn,
    Role,
    get_role,
    get_said,
    parse_pair,
)
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.format.media import make_numbered_parts
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.annotations import AnnotatedSample, AnnotationContext
from onellm_dist.shards.sources.readers.img2dataset import to_plain_json
from onellm_dist.shards.sources.readers.media_rows import (
    check_tags,
    find_medium,
    list_row_media,
    require_all_read,
    require_text_alone,
    unify_tags,
)

_KEPT = ("id", "source", "data_source", "sample_id", "dataset", "metadata", "origin_dataset")
"""Values of a row that the `.json` keeps."""
_ALIKE = "answers: chosen and rejected are the same"
_MEDIA = ("image", "video", "audio")
_TAG = re.compile(r"<(?:image|video|audio|speech)>", re.IGNORECASE)
_STORED = {"system": "system", "user": "human", "assistant": "gpt"}
"""Role to the speaker that shards store."""
_Turns = list[dict[str, Any]]


def read_preference_row(
    context: AnnotationContext, row: Mapping[str, Any], key: str, modalities: Sequence[str]
) -> AnnotatedSample:
    """Make the sample of a row.

    Args:
        context: where the media lie.
        row: the row.
        key: the sample's key.
        modalities: those of the dataset; () for texts alone.

    Raises:
        BadSampleError: a medium is missing or of a modality that the dataset does not have, the
            placeholders do not fit the media, or the row has no two different answers.
        TurnsError: a conversation cannot be used.
    """
    shared, chosen, rejected = split_row(row)
    asked = {**row, "conversations": shared}
    names = list(list_row_media(asked))
    if modalities:
        require_all_read(asked, modalities, has_media=bool(names))
    else:
        require_text_alone(asked, chosen, rejected)
    if unknown := sorted({name for name, _ in names} - set(modalities)):
        raise BadSampleError(
            f"media of another modality: the row has {', '.join(unknown)} (-o modality="
            f"{','.join(modalities)})"
        )
    pair = parse_pair(
        {"conversations": shared, "chosen": chosen, "rejected": rejected},
        all_modalities(),
        placeholders=bool(modalities),
    )
    media = [name for name, _ in names]
    texts = [
        [_store(turn, unify_tags(turn.text, media) if media else turn.text) for turn in turns]
        for turns in pair
    ]
    said = [[turn["value"] for turn in turns] for turns in texts]
    if said[0] == said[1]:
        raise BadSampleError(_ALIKE)
    count = len(shared)
    if not all(text for values in said for text in values[count:]):
        raise BadSampleError("answers: one of them is empty")
    for turns, whole in zip(texts, pair, strict=True):
        for turn, parsed in zip(turns[count:], whole[count:], strict=True):
            if not parsed.weight:
                turn["weight"] = 0
    for turns in texts if modalities else ():
        check_tags(turns, media, modalities)
    meta: dict[str, Any] = {
        k: to_plain_json(row[k]) for k in _KEPT if isinstance(row.get(k), str | int | dict)
    }
    parts: Mapping[str, Any] = {}
    if modalities:
        found = [(name, find_medium(context, name, medium)) for name, medium in names]
        parts, meta["media"] = make_numbered_parts(found)
    meta |= {"chosen": texts[0][count:], "rejected": texts[1][count:]}
    return AnnotatedSample(key, parts, texts[0][:count], meta=meta)


def split_row(row: Mapping[str, Any]) -> tuple[_Turns, _Turns, _Turns]:
    """The turns that both answers of a row follow, and the turns of either; see the module.

    Raises:
        BadSampleError: the row has none of the known forms, its answers are the same, they are
            about different media, or its prompt is not what they begin with.
    """
    row = _read_text(row)
    shared, chosen, rejected = _split(row)
    _check_media({**row, "conversations": shared})
    system = row.get("system")
    has_own = bool(shared) and _speaks(shared[0]) == "system"
    if isinstance(system, str) and system.strip() and not has_own:
        shared = [{"role": "system", "content": system}, *shared]
    return shared, chosen, rejected


def _check_media(row: Mapping[str, Any]) -> None:
    """Compare the media of the rejected answer, where the row lists them, with those of the row.

    Raises:
        BadSampleError: they are others.
    """
    both = list(list_row_media(row))
    for name in _MEDIA:
        other = {f: row.get(f"rejected_{f}") for f in (name, f"{name}s")}
        rejected = list(list_row_media(other))
        if rejected and rejected != [item for item in both if item[0] == name]:
            key = next(f for f in other if other[f])
            raise BadSampleError(
                f"media of the rejected answer alone: rejected_{key} is not {key}, and both "
                "answers of a pair are about the same media"
            )


def _split(row: Mapping[str, Any]) -> tuple[_Turns, _Turns, _Turns]:
    chosen, rejected = (_make_turns(row.get(key), "assistant") for key in PAIR_KEYS)
    prompts = _list_prompts(row)
    beside, shared = prompts[0] if prompts else ("", [])
    explicit = all(row.get(key) is not None for key in PAIR_KEYS)
    response, messages = row.get("rejected_response"), row.get("rejected_messages")
    wholes = None
    if all(turns and _speaks(turns[0]) in ("user", "system") for turns in (chosen, rejected)):
        wholes = chosen, rejected
    elif response or messages or (response is not None and not explicit):
        other = messages or [*shared[:-1], *_make_turns(response, "assistant")]
        wholes, prompts = (shared, _make_turns(other, "assistant")), prompts[1:]
    if wholes is not None:
        shared, *answers = _split_common(*wholes)
        for field, prompt in prompts:
            shared = _join_prompt(field, prompt, shared, answers)
        return shared, answers[0], answers[1]
    has_outputs = all(row.get(key) is not None for key in ("output_1", "output_2"))
    for field, prompt in prompts[1:]:
        after = [] if has_outputs else [chosen, rejected]
        shared = _join_prompt(field, prompt, shared, after, beside)
    if has_outputs:
        return _split_outputs(row, shared)
    if not explicit:
        raise BadSampleError("unreadable row: it has no chosen and rejected answer")
    return (shared, chosen, rejected) if shared else _split_common(chosen, rejected)


def _split_outputs(row: Mapping[str, Any], shared: _Turns) -> tuple[_Turns, _Turns, _Turns]:
    """LLaVA-RLHF's two outputs, the better one first."""
    better = row.get("preference")
    if isinstance(better, bool) or better not in (1, 2):
        raise BadSampleError(f"unreadable row: preference is {better!r:.40}, neither 1 nor 2")
    better = int(better)  # pandas writes whole numbers as floats where one is missing
    if shared and _speaks(shared[-1]) == "assistant":
        shared = shared[:-1]  # the outputs take its place
    outputs = [_make_output(row, f"output_{number}") for number in (better, 3 - better)]
    return shared, outputs[0], outputs[1]


def _join_prompt(
    field: str, prompt: _Turns, shared: _Turns, answers: Sequence[_Turns], beside: str = ""
) -> _Turns:
    """The shared turns, with those turns of a column of the prompt that they lack.

    Args:
        field: the column.
        prompt: its turns; they may go on to the end of either conversation (ultrafeedback).
        shared: what both conversations begin with, or what the columns before it say.
        answers: how both go on; [] where the shared turns have an answer already.
        beside: the first of the columns before it; "" where the row has whole conversations.

    Raises:
        BadSampleError: the column is neither part of the shared turns nor what precedes or, of
            columns alone, follows them.
    """
    last = _read_both_ways(shared[-1])
    asked = _read_turns(prompt)
    for answer in map(_read_turns, answers):
        count = len(asked) - len(answer)
        if answer and count > 0 and asked[count - 1] in last and asked[count:] == answer:
            asked = asked[:count]
    prompt = prompt[: len(asked)]
    first, end = _speaks(prompt[0]), _speaks(prompt[-1])
    common_first, common_end = _speaks(shared[0]), _speaks(shared[-1])
    may_follow = bool(beside and answers) and (common_end, end) != ("user", "assistant")
    if joined := _overlay(prompt, shared, may_follow=may_follow):
        return joined
    is_open = common_end == "system" or (may_follow and (common_end, end) == ("assistant", "user"))
    if beside and first == "user" and is_open:
        return [*shared, *prompt]
    is_answered = len(asked) > 1 and asked[-2] in last  # by neither of the two
    is_earlier = (end, common_end) == ("assistant", "user") and not is_answered
    if common_first == "user" and (end == "system" or is_earlier):
        return [*prompt, *shared]
    where = f"{beside} ends with {_quote(shared[-1])}"
    if not beside:
        where = f"both answers' conversations begin with {_quote(shared[0])}"
    raise BadSampleError(
        f"prompt: {field} ends with {_quote(prompt[-1])}, and {where}: the prompt is neither part "
        f"of {'it nor what precedes or follows it' if beside else 'them nor what precedes them'}"
    )


def _overlay(prompt: _Turns, shared: _Turns, *, may_follow: bool) -> _Turns | None:
    """The shared turns, with those of the prompt around them; None: the two have no turn in common.

    A text may be that of a shared turn with media: it is the shared turn that is kept.
    """
    asked, said = _read_turns(prompt), [_read_both_ways(turn) for turn in shared]
    end = len(said) - len(asked)
    places = [*range(end, -len(asked), -1), *(range(end + 1, len(said)) if may_follow else ())]
    for place in places:
        before, start = max(-place, 0), max(place, 0)
        count = min(len(asked) - before, len(said) - start)
        if all(asked[before + i] in said[start + i] for i in range(count)):
            return [*prompt[:before], *shared, *prompt[before + count :]]
    return None


def _read_both_ways(turn: Any) -> tuple[Any, Any]:
    """A turn with and without its media."""
    return _read_turn(turn), _read_turn(turn, media=False)


def _quote(turn: Any) -> str:
    said = _read_turn(turn)
    return f"{said[0]}: {said[1]!r:.50}" if isinstance(said, tuple) else f"{said!r:.60}"


def _read_text(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of RLHF-V with what its `text` says; other rows as they are."""
    text = row.get("text")
    if not isinstance(text, str) or any(row.get(key) is not None for key in PAIR_KEYS):
        return row
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return row
    if not isinstance(said, dict) or any(key not in said for key in PAIR_KEYS):
        return row
    return {**row, **{key: said.get(key) for key in ("question", *PAIR_KEYS)}}


def _list_prompts(row: Mapping[str, Any]) -> list[tuple[str, _Turns]]:
    """Each column that says what is asked, with its turns.

    Raises:
        BadSampleError: the history of an instruction cannot be read.
    """
    found = {key: row.get(key) for key in (*CONVERSATION_KEYS, "prompt", "question")}
    prompts = [
        (key, _make_turns(value, "user"))
        for key, value in found.items()
        if (value.strip() if isinstance(value, str) else value)
    ]
    asked = "\n".join(str(x) for k in ("instruction", "input") if (x := row.get(k)))
    history = row.get("history") or []
    if not asked.strip() and not (prompts and history):
        return prompts
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or len(pair) != 2 for pair in history
    ):
        raise BadSampleError("unreadable row: history is not a list of pairs of texts")
    earlier = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if not asked.strip():
        return [*prompts, ("history", earlier)]
    return [*prompts, ("instruction", [*earlier, {"role": "user", "content": asked}])]


def _make_output(row: Mapping[str, Any], key: str) -> _Turns:
    """The answer of a text, or of a turn of whoever answered (LLaVA-RLHF: `llava`)."""
    output = row[key]
    text = get_said(output) if isinstance(output, dict) else output
    if not isinstance(text, str):
        raise BadSampleError(f"unreadable row: {key} is {output!r:.60}, neither a text nor a turn")
    return [{"role": "assistant", "content": text}]


def _split_common(chosen: _Turns, rejected: _Turns) -> tuple[_Turns, _Turns, _Turns]:
    """Take off the turns that two whole conversations begin with.

    Raises:
        BadSampleError: they are the same, or begin with different turns.
    """
    first, second = _read_turns(chosen), _read_turns(rejected)
    if first == second:
        raise BadSampleError(_ALIKE)
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    if not count:
        alone = all(turns and _speaks(turns[0]) == "assistant" for turns in (chosen, rejected))
        raise BadSampleError(
            "unreadable row: the row has no prompt"
            if alone or not chosen
            else "unreadable row: chosen and rejected begin with different turns"
        )
    return chosen[:count], chosen[count:], rejected[count:]


def _read_turns(turns: _Turns) -> list[Any]:
    return [_read_turn(turn) for turn in turns]


def _read_turn(turn: Any, *, media: bool = True) -> Any:
    """Who says what in a turn, and calls which tool, however it is written.

    What is not a turn is returned as it is.

    Args:
        turn: the turn.
        media: whether media among its content parts, and their placeholders, are of what is said.
    """
    if not isinstance(turn, dict):
        return turn
    said = get_said(turn)
    parts: list[Any] = said if isinstance(said, list) else [None]
    if not media and isinstance(said, list):
        parts = [p for p in said if not isinstance(p, dict) or p.get("type") == "text"]
    if all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        said = "".join(str(part.get("text") or "") for part in parts)
    if isinstance(said, str):
        said = (said if media else _TAG.sub("", said)).strip()
    return _speaks(turn), said, [turn.get(key) or None for key in ("tool_calls", "function_call")]


def _speaks(turn: Any) -> Role | None:
    return get_role(turn) if isinstance(turn, dict) else None


def _make_turns(value: Any, role: str) -> _Turns:
    """Turns as they are; a turn alone, or a text, as a list."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else [value]


def _store(turn: ConversationTurn, text: str) -> dict[str, Any]:
    """The turn as shards store it, stripped as all sources strip."""
    return {"from": _STORED[turn.role], "value": text.strip()}
