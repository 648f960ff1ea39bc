"""`onellm shards build laion400m IN OUT`: LAION-400M (or Re-LAION, COYO, ...) as img2dataset downloaded it: tars with parquet and stats.

The caption is the alt text: img2dataset's column `caption` (`--caption_col TEXT`), else `TEXT` among the additional columns, else the
tar's `.txt`. All other columns go to `.json`, where the builder's filters read `NSFW`, `similarity`, `punsafe`, `pwatermark`, `url`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onellm_dist.modalities import get_modality
from onellm_dist.shards.sources.base import DatasetDescription, RawSample, Source, SplitDescription
from onellm_dist.shards.sources.readers.img2dataset import (
    UNFINISHED_OPTION,
    Text,
    find_tars,
    tar_groups,
    tar_raw_samples,
)

ALT_COLUMNS = ("caption", "text")
"""In any case: img2dataset's own name, LAION's (`TEXT`)."""


def column(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of these columns that has a value, whatever its case; None: none has."""
    lower = {k.lower(): v for k, v in row.items() if v is not None}
    return next((lower[n] for n in names if n in lower), None)


def alt_caption(row: Mapping[str, Any], text: Text) -> list[str | None]:
    """The alt text of a picture."""
    found = column(row, ALT_COLUMNS)
    return [found if isinstance(found, str) else text()]


def plan(inputs: Path, *, seed: int, unfinished: str) -> DatasetDescription:
    """A group for each tar.

    Raises:
        UsageError: no tars, or unfinished ones.
    """
    groups, notes = tar_groups(inputs, find_tars(inputs), unfinished)
    return DatasetDescription(("image",), groups, notes)


def raw_samples(
    inputs: Path, description: SplitDescription, *, unfinished: str
) -> Iterator[RawSample]:
    """One tar's."""
    return tar_raw_samples(
        inputs, description, get_modality("image").required_parts["image"], alt_caption
    )


SOURCE = Source(
    name="laion400m",
    summary="LAION-400M or Re-LAION: tars, parquet and stats of img2dataset",
    plan=plan,
    raw_samples=raw_samples,
    options={"unfinished": UNFINISHED_OPTION},
    licence="metadata CC-BY 4.0 (LAION); pictures under their owners' copyright",
)
