"""`onellm shards build laion400m IN OUT`: LAION-400M, Re-LAION or COYO as img2dataset stores it.

The input is tars with parquet and stats. The caption is the alt text: img2dataset's column
`caption` (`--caption_col TEXT`), else `TEXT` among the additional columns, else the tar's `.txt`.
All other columns go to `.json`, where the builder's filters read `NSFW`, `similarity`, `punsafe`,
`pwatermark` and `url`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onellm_dist.modalities import get_modality
from onellm_dist.shards.sources.base import DatasetDescription, RawSample, Source, SplitDescription
from onellm_dist.shards.sources.readers.img2dataset import (
    UNFINISHED_OPTION,
    choose_alt_text,
    find_tars,
    read_tar_samples,
    split_tars,
)


def plan(inputs: Path, *, seed: int, unfinished: str) -> DatasetDescription:
    """Make an input split of each tar.

    Raises:
        UsageError: there are no tars, or unfinished ones.
    """
    splits, notes = split_tars(inputs, find_tars(inputs), unfinished)
    return DatasetDescription(("image",), splits, notes)


def raw_samples(
    inputs: Path, description: SplitDescription, *, unfinished: str
) -> Iterator[RawSample]:
    """Read the samples of one tar."""
    return read_tar_samples(
        inputs, description, get_modality("image").required_parts["image"], choose_alt_text
    )


SOURCE = Source(
    name="laion400m",
    summary="LAION-400M or Re-LAION: tars, parquet and stats of img2dataset",
    plan=plan,
    raw_samples=raw_samples,
    options={"unfinished": UNFINISHED_OPTION},
    licence="metadata CC-BY 4.0 (LAION); pictures under their owners' copyright",
    reads_as_stored=True,
)
