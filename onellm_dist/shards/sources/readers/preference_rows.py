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
them (preference_prompts.py). Several forms of the answers must say the same
(preference_columns.py). The column `system` is the system turn. Both answers are about the same
media: names of files, or bytes in tables (ultrafeedback_binarized, RLAIF-V and RLHF-V are parquet).

A sample's `.json` has `conversations` (the shared turns), `chosen` and `rejected` (turns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onellm_dist.common.turns import CONVERSATION_KEYS, ConversationTurn, parse_pair
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.format.media import make_numbered_parts
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.annotations import AnnotatedSample, AnnotationContext
from onellm_dist.shards.sources.readers.img2dataset import to_plain_json
from onellm_dist.shards.sources.readers.media_rows import (
    MEDIA_FIELDS,
    check_tags,
    find_medium,
    list_row_media,
    require_all_read,
    require_text_alone,
    unify_tags,
)
from onellm_dist.shards.sources.readers.preference_columns import find_answers, list_prompts
from onellm_dist.shards.sources.readers.preference_prompts import (
    PromptColumn,
    add_system,
    join_columns,
)
from onellm_dist.shards.sources.readers.preference_turns import (
    ALIKE,
    Turns,
    is_given,
    split_common,
)

_KEPT = ("id", "source", "data_source", "sample_id", "dataset", "metadata", "origin_dataset")
"""Values of a row that the `.json` keeps."""
_STORED = {"system": "system", "user": "human", "assistant": "gpt"}
"""Role to the speaker that shards store."""


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
    if not modalities:
        require_text_alone(asked, chosen, rejected)
    names = _list_media(row, shared, chosen, rejected)
    if modalities:
        require_all_read(asked, modalities, has_media=bool(names))
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
        raise BadSampleError(ALIKE)
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


def split_row(row: Mapping[str, Any]) -> tuple[Turns, Turns, Turns]:
    """The turns that both answers of a row follow, and the turns of either; see the module.

    Raises:
        BadSampleError: the row has none of the known forms, its answers are the same, they are
            about different media, or its columns contradict each other.
        TurnsError: two keys of a turn contradict each other.
    """
    pair, prompts, answers = find_answers(row, list_prompts(row))
    chosen, rejected = pair.chosen, pair.rejected
    columns = [PromptColumn("", pair.shared), *prompts] if pair.shared else prompts
    if columns:
        shared = join_columns(columns, answers)
    else:
        shared, chosen, rejected = split_common(chosen, rejected)
    if is_given(system := row.get("system")):
        shared = add_system(shared, system)
    _check_media({**row, "conversations": shared})
    return shared, chosen, rejected


def _list_media(
    row: Mapping[str, Any], shared: Turns, chosen: Turns, rejected: Turns
) -> list[tuple[str, str | Mapping[str, Any]]]:
    """List the media of both conversations, in the order of their placeholders.

    Raises:
        BadSampleError: the conversations have others, or their order is not clear.
    """
    columns = list(list_row_media({k: v for k, v in row.items() if k not in CONVERSATION_KEYS}))
    begun, *ends = (
        list(list_row_media({"conversations": turns})) for turns in (shared, chosen, rejected)
    )
    if ends[0] != ends[1]:
        said = (", ".join(map(_quote_medium, media)) or "no medium" for media in ends)
        raise BadSampleError(
            "media inside an answer: behind what both share chosen has {}, and rejected {}; both "
            "are about the same media".format(*said)
        )
    parts = [*begun, *ends[0]]
    if both := sorted({name for name, _ in columns} & {name for name, _ in parts}):
        raise BadSampleError(
            f"media of two places: {both[0]} in a column, and among content parts; their order is "
            "not clear"
        )
    return [*columns, *parts]


def _quote_medium(medium: tuple[str, str | Mapping[str, Any]]) -> str:
    name, held = medium
    return f"{name} {held if isinstance(held, str) else held.get('path') or 'bytes'}"


def _check_media(row: Mapping[str, Any]) -> None:
    """Compare the media of the rejected answer, where the row lists them, with those of the row.

    Raises:
        BadSampleError: they are others.
    """
    both = list(list_row_media(row))
    for name, fields in MEDIA_FIELDS.items():
        other = {f: row.get(f"rejected_{f}") for f in fields}
        rejected = list(list_row_media(other))
        if rejected and rejected != [item for item in both if item[0] == name]:
            key = next(f for f in other if other[f])
            raise BadSampleError(
                f"media of the rejected answer alone: rejected_{key} is not {key}, and both "
                "answers of a pair are about the same media"
            )


def _store(turn: ConversationTurn, text: str) -> dict[str, Any]:
    """The turn as shards store it, stripped as all sources strip."""
    return {"from": _STORED[turn.role], "value": text.strip()}
