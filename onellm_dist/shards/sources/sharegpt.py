"""`onellm shards build sharegpt IN OUT`: conversations without media, as ShareGPT stores them.

(Those with media, in the same form: `interleaved`.)

IN is one .json or .jsonl, or a folder of them, with rows {id, conversations: [{from, value}]}.
Speakers may be human/gpt or user/assistant, turns {from, value} or {role, content}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.base import DatasetDescription, RawSample, Source, SplitDescription
from onellm_dist.shards.sources.readers.annotations import AnnotatedSample, read_raw_samples
from onellm_dist.shards.sources.readers.conversations import clean_turns, require_conversation
from onellm_dist.shards.sources.readers.json_stream import JsonItem, read_rows, split_rows
from onellm_dist.shards.sources.readers.listing import list_files
from onellm_dist.shards.sources.readers.text_files import JSON_SUFFIXES
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique

_ROWS = 1000


def plan(inputs: Path, *, seed: int) -> DatasetDescription:
    """Divide the files into ranges of rows.

    Raises:
        UsageError: there is no such file.
    """
    if inputs.is_file():
        return DatasetDescription((), split_rows(inputs.parent, inputs.name, _ROWS))
    listed = list_files(inputs)
    names = [p.name for p in listed.files if p.suffix.lower() in JSON_SUFFIXES]
    if not names:
        raise UsageError(
            f"{inputs} has no .json or .jsonl.",
            "there is nothing to build from.",
            "name the file, or its folder.",
        )
    # a.json and a.jsonl, or a.b.json and a_b.json, are different files
    stems = make_keys_unique(n.rpartition(".")[0].replace(".", "_") for n in names)
    splits = (
        split
        for name, stem in zip(names, stems, strict=True)
        for split in split_rows(inputs, name, _ROWS, stem=stem)
    )
    return DatasetDescription((), splits, listed.make_notes(JSON_SUFFIXES))


def raw_samples(inputs: Path, description: SplitDescription) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    root = inputs.parent if inputs.is_file() else inputs
    name: str = description["file"]
    stem = description.get("stem", name.rpartition(".")[0].replace(".", "_"))
    for item in read_rows(root, description):
        yield from read_raw_samples(lambda i: _read_conversation(i, stem), item, 1, "fail")


def _read_conversation(item: JsonItem, stem: str) -> Sequence[AnnotatedSample]:
    row = item.value
    turns = clean_turns(require_conversation(row), tags=False)
    meta = {"id": row["id"]} if isinstance(row.get("id"), (str, int)) else {}
    return [AnnotatedSample(f"{stem}-{item.number:07d}", {}, turns, meta=meta)]


SOURCE = Source(
    "sharegpt",
    "conversations without media: .json or .jsonl of {conversations: [{from, value}]}",
    plan=plan,
    raw_samples=raw_samples,
    licence="unknown",
    reads_as_stored=True,
)
