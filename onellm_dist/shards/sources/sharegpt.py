"""`onellm shards build sharegpt IN OUT`: conversations without media, as ShareGPT stores them.

IN is one .json or .jsonl, or a folder of them, with rows {id, conversations: [{from, value}]}.
Speakers may be human/gpt or user/assistant, turns {from, value} or {role, content}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.base import DatasetDescription, RawSample, Source, SplitDescription
from onellm_dist.shards.sources.readers.annotations import AnnotatedSample, read_raw_samples
from onellm_dist.shards.sources.readers.conversations import clean_turns
from onellm_dist.shards.sources.readers.json_stream import JsonItem, read_rows, split_rows

_ROWS = 1000


def plan(inputs: Path, *, seed: int) -> DatasetDescription:
    """Divide the files into ranges of rows.

    Raises:
        UsageError: there is no such file.
    """
    names = (
        [inputs.name]
        if inputs.is_file()
        else sorted(p.name for p in inputs.iterdir() if p.suffix in (".json", ".jsonl"))
    )
    if not names:
        raise UsageError(
            f"{inputs} has no .json or .jsonl.",
            "there is nothing to build from.",
            "name the file, or its folder.",
        )
    root = inputs.parent if inputs.is_file() else inputs
    return DatasetDescription((), (g for name in names for g in split_rows(root, name, _ROWS)))


def raw_samples(inputs: Path, description: SplitDescription) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    root = inputs.parent if inputs.is_file() else inputs
    for item in read_rows(root, description):
        yield from read_raw_samples(_read_conversation, item, 1, "fail")


def _read_conversation(item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    raw = row["messages"] if "messages" in row else row["conversations"]
    meta = {"id": row["id"]} if isinstance(row.get("id"), (str, int)) else {}
    stem = item.where.partition("[")[0].rpartition(".")[0].replace(".", "_")
    return [
        AnnotatedSample(f"{stem}-{item.number:07d}", {}, clean_turns(raw, tags=False), meta=meta)
    ]


SOURCE = Source(
    "sharegpt",
    "conversations without media: .json or .jsonl of {conversations: [{from, value}]}",
    plan=plan,
    raw_samples=raw_samples,
    licence="unknown",
)
