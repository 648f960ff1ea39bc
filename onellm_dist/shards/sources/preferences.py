"""`onellm shards build preferences IN OUT`: conversations with a chosen and a rejected answer.

IN is one .json or .jsonl, or a folder of them. Media are as in `interleaved`; the forms of rows
stand in readers/preference_rows.py. For `train.loss: dpo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onellm_dist.shards.sources.base import (
    DatasetDescription,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.interleaved import make_context, make_row_key, plan
from onellm_dist.shards.sources.readers.annotations import AnnotatedSample, read_raw_samples
from onellm_dist.shards.sources.readers.json_stream import JsonItem, read_rows
from onellm_dist.shards.sources.readers.media_rows import parse_media_modalities
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION
from onellm_dist.shards.sources.readers.preference_rows import read_preference_row


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    modality: str | None,
    media: Path | None,
    missing: str,
) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    context = make_context(inputs, description, media)
    names = () if modality is None else parse_media_modalities(modality)

    def read(item: JsonItem) -> list[AnnotatedSample]:
        return [read_preference_row(context, item.value, make_row_key(description, item), names)]

    for item in read_rows(context.inputs, description):
        yield from read_raw_samples(read, item, 1, missing)


def _plan(
    inputs: Path, *, seed: int, modality: str | None, media: Path | None, missing: str
) -> DatasetDescription:
    return plan(inputs, seed=seed, modality=modality, media=media, missing=missing)


SOURCE = Source(
    "preferences",
    "conversations with a chosen and a rejected answer, for DPO: JSON or JSONL",
    plan=_plan,
    raw_samples=raw_samples,
    options={
        "modality": Option(None, "what the media may be: image,video; default: text alone"),
        "media": Option(None, "the folder at which the rows' paths begin; default: IN", Path),
        "missing": MISSING_OPTION,
    },
    licence="unknown",
    reads_as_stored=True,
)
