"""`onellm shards build pointllm IN OUT`: PointLLM's conversations about Objaverse's point clouds.

IN holds 8192_npy/<object_id>_8192.npy and PointLLM_complex_instruction_70K.json (or
PointLLM_brief_description_660K_filtered.json, of which `cap3d` makes captions). Rows are
{object_id, conversation_type, conversations}, with PointLLM's own prompts. The `<point>` before a
question is removed.
"""

from __future__ import annotations

from collections.abc import Sequence

from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    AnnotationContext,
    AnnotationSet,
    require_text,
)
from onellm_dist.shards.sources.readers.conversations import clean_turns, require_conversation
from onellm_dist.shards.sources.readers.json_stream import JsonItem

_FILES = ("PointLLM_complex_instruction_70K.json", "PointLLM_brief_description_660K_filtered.json")


def _read_conversation(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    uid = require_text(row["object_id"], "object_id")
    names = [f"{uid}_8192.npy", f"{uid}.npy", f"{uid}.ply"]
    meta = {"object_id": uid, "conversation_type": str(row.get("conversation_type", ""))}
    return [
        AnnotatedSample(
            f"{uid}-{item.number:06d}",
            context.find_media("point", *names),
            clean_turns(require_conversation(row)),
            meta=meta,
        )
    ]


SOURCE = AnnotationSet(
    "pointllm",
    "PointLLM's conversations (70K complex, or 660K brief) with 8192_npy/",
    "point",
    {"train": tuple(f"{folder}{name}" for name in _FILES for folder in ("", "anno_data/"))},
    _read_conversation,
    folders=("8192_npy", "objaverse_data", "data/objaverse_data"),
    licence="CC-BY-NC-SA 4.0 (conversations); objects under their own licences",
).make_source()
