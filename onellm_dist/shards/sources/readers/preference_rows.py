"""Rows of preferences, in the forms in which data for DPO has them.

| form | prompt | answers |
|---|---|---|
| ours, LLaMA-Factory | `conversations`, `messages` | `chosen`, `rejected`: a turn, turns or text |
| TRL, explicit | `prompt`: turns or text | `chosen`, `rejected`: turns or text |
| TRL, implicit | what both begin with | `chosen`, `rejected`: whole conversations |
| ms-swift | `messages` with the answer | `rejected_response`: text; `rejected_messages` |
| LLaVA-RLHF | `conversations` | `output_1`, `output_2`; `preference`: 1 or 2 |
| RLAIF-V, RLHF-V | `question` | `chosen`, `rejected`: text |

A sample's `.json` has `conversations` (the shared turns), `chosen` and `rejected` (turns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onellm_dist.common.turns import find_conversation, parse_pair
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.format.media import make_numbered_parts
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.annotations import AnnotatedSample, AnnotationContext
from onellm_dist.shards.sources.readers.conversations import Turn
from onellm_dist.shards.sources.readers.media_rows import (
    check_tags,
    find_medium,
    list_row_media,
    unify_tags,
)

KEPT = ("id", "source", "data_source", "sample_id", "dataset", "metadata", "origin_dataset")
"""Values of a row that the `.json` keeps."""
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
        [_store(turn.role, unify_tags(turn.text, media) if media else turn.text) for turn in turns]
        for turns in pair
    ]
    if texts[0] == texts[1]:
        raise BadSampleError("answers: chosen and rejected are the same")
    count = len(shared)
    if any(not turn["value"].strip() for turns in texts for turn in turns[count:]):
        raise BadSampleError("answers: one of them is empty")
    for turns in texts if modalities else ():
        check_tags(turns, media, modalities)
    meta: dict[str, Any] = {k: row[k] for k in KEPT if isinstance(row.get(k), str | int | dict)}
    parts: Mapping[str, Any] = {}
    if modalities:
        found = [(name, find_medium(context, name, path)) for name, path in names]
        parts, meta["media"] = make_numbered_parts(found)
    meta |= {"chosen": texts[0][count:], "rejected": texts[1][count:]}
    return AnnotatedSample(key, parts, texts[0][:count], meta=meta)


def split_row(row: Mapping[str, Any]) -> tuple[_Turns, _Turns, _Turns]:
    """The turns that both answers of a row follow, and the turns of either; see the module.

    Raises:
        BadSampleError: the row has none of the known forms.
    """
    shared = _make_turns(find_conversation(row) or row.get("prompt") or row.get("question"), "user")
    if "rejected_response" in row or "rejected_messages" in row:
        other = row.get("rejected_messages") or [
            *shared[:-1],
            *_make_turns(row.get("rejected_response"), "assistant"),
        ]
        return _split_common(shared, _make_turns(other, "assistant"))
    if "output_1" in row and "output_2" in row:
        better = row.get("preference")
        if better not in (1, 2):
            raise BadSampleError(f"unreadable row: preference is {better!r:.40}, neither 1 nor 2")
        outputs = [_make_turns(row[f"output_{n}"], "assistant") for n in (better, 3 - better)]
        return shared, outputs[0], outputs[1]
    if row.get("chosen") is None or row.get("rejected") is None:
        raise BadSampleError("unreadable row: it has no chosen and rejected answer")
    chosen, rejected = (_make_turns(row[k], "assistant") for k in ("chosen", "rejected"))
    return (shared, chosen, rejected) if shared else _split_common(chosen, rejected)


def _split_common(chosen: _Turns, rejected: _Turns) -> tuple[_Turns, _Turns, _Turns]:
    """Take off the turns that two whole conversations begin with."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    return chosen[:count], chosen[count:], rejected[count:]


def _make_turns(value: Any, role: str) -> _Turns:
    """Turns as they are; a turn alone, or a text, as a list."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else [value]


def _store(role: str, text: str) -> Turn:
    return {"from": _STORED[role], "value": text}
