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

The column `system` is the system turn of a prompt that has none. Both answers are about the same
media.

A sample's `.json` has `conversations` (the shared turns), `chosen` and `rejected` (turns).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from onellm_dist.common.turns import (
    PAIR_KEYS,
    ConversationTurn,
    Role,
    find_conversation,
    get_role,
    parse_pair,
)
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.format.media import make_numbered_parts
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.annotations import AnnotatedSample, AnnotationContext
from onellm_dist.shards.sources.readers.media_rows import (
    check_tags,
    find_medium,
    list_row_media,
    unify_tags,
)

_KEPT = ("id", "source", "data_source", "sample_id", "dataset", "metadata", "origin_dataset")
"""Values of a row that the `.json` keeps."""
_ALIKE = "answers: chosen and rejected are the same"
_MEDIA = tuple(f"{name}{s}" for name in ("image", "video", "audio") for s in ("", "s"))
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
    names = list(list_row_media({**row, "messages": shared}))
    if unknown := sorted({name for name, _ in names} - set(modalities)):
        raise BadSampleError(
            f"media of another modality: the row has {', '.join(unknown)} (-o modality="
            f"{','.join(modalities) or ','.join(unknown)})"
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
    meta: dict[str, Any] = {k: row[k] for k in _KEPT if isinstance(row.get(k), str | int | dict)}
    parts: Mapping[str, Any] = {}
    if modalities:
        found = [(name, find_medium(context, name, path)) for name, path in names]
        parts, meta["media"] = make_numbered_parts(found)
    meta |= {"chosen": texts[0][count:], "rejected": texts[1][count:]}
    return AnnotatedSample(key, parts, texts[0][:count], meta=meta)


def split_row(row: Mapping[str, Any]) -> tuple[_Turns, _Turns, _Turns]:
    """The turns that both answers of a row follow, and the turns of either; see the module.

    Raises:
        BadSampleError: the row has none of the known forms, its answers are the same, or they are
            about different media.
    """
    row = _read_text(row)
    for name in _MEDIA:
        other = row.get(f"rejected_{name}")
        if other and other != row.get(name):
            raise BadSampleError(
                f"media of the rejected answer alone: rejected_{name} is not {name}, and both "
                "answers of a pair are about the same media"
            )
    shared, chosen, rejected = _split(row)
    system = row.get("system")
    has_own = bool(shared) and _speaks(shared[0]) == "system"
    if isinstance(system, str) and system.strip() and not has_own:
        shared = [{"role": "system", "content": system}, *shared]
    return shared, chosen, rejected


def _split(row: Mapping[str, Any]) -> tuple[_Turns, _Turns, _Turns]:
    chosen, rejected = (_make_turns(row.get(key), "assistant") for key in PAIR_KEYS)
    if all(turns and _speaks(turns[0]) in ("user", "system") for turns in (chosen, rejected)):
        return _split_common(chosen, rejected)
    shared = _find_prompt(row)
    response, messages = row.get("rejected_response"), row.get("rejected_messages")
    if response is not None or messages is not None:
        other = messages or [*shared[:-1], *_make_turns(response, "assistant")]
        return _split_common(shared, _make_turns(other, "assistant"))
    if "output_1" in row and "output_2" in row:
        better = row.get("preference")
        if better not in (1, 2):
            raise BadSampleError(f"unreadable row: preference is {better!r:.40}, neither 1 nor 2")
        if shared and _speaks(shared[-1]) == "assistant":
            shared = shared[:-1]  # the outputs take its place
        outputs = [_make_output(row, f"output_{number}") for number in (better, 3 - better)]
        return shared, outputs[0], outputs[1]
    if row.get("chosen") is None or row.get("rejected") is None:
        raise BadSampleError("unreadable row: it has no chosen and rejected answer")
    return (shared, chosen, rejected) if shared else _split_common(chosen, rejected)


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


def _find_prompt(row: Mapping[str, Any]) -> _Turns:
    found = find_conversation(row) or row.get("prompt") or row.get("question")
    if found or not row.get("instruction"):
        return _make_turns(found, "user")
    asked = "\n".join(str(x) for k in ("instruction", "input") if (x := row.get(k)))
    history = row.get("history") or []
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or len(pair) != 2 for pair in history
    ):
        raise BadSampleError("unreadable row: history is not a list of pairs of texts")
    earlier = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*earlier, {"role": "user", "content": asked}]


def _make_output(row: Mapping[str, Any], key: str) -> _Turns:
    """The answer of a text, or of a turn of whoever answered (LLaVA-RLHF: `llava`)."""
    output = row[key]
    text = output.get("value", output.get("content")) if isinstance(output, dict) else output
    if not isinstance(text, str):
        raise BadSampleError(f"unreadable row: {key} is {output!r:.60}, neither a text nor a turn")
    return [{"role": "assistant", "content": text}]


def _split_common(chosen: _Turns, rejected: _Turns) -> tuple[_Turns, _Turns, _Turns]:
    """Take off the turns that two whole conversations begin with.

    Raises:
        BadSampleError: they are the same.
    """
    first, second = ([_read_turn(turn) for turn in turns] for turns in (chosen, rejected))
    if first == second:
        raise BadSampleError(_ALIKE)
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return chosen[:count], chosen[count:], rejected[count:]


def _read_turn(turn: Any) -> Any:
    """Who says what in a turn, however it is written; what is no turn as it is."""
    if not isinstance(turn, dict):
        return turn
    said = turn.get("value", turn.get("content"))
    return _speaks(turn), said.strip() if isinstance(said, str) else said


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
