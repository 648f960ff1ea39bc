"""`onellm shards build laion-coco IN OUT`: LAION-COCO as img2dataset stores it.

The usual recipe of img2dataset passes `--caption_col TEXT`, so that the tars' `.txt` is the alt
text. The dataset's purpose is `top_caption`, a synthetic caption, which is in the metadata if the
download kept it (`--save_additional_columns`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.shards.sources.base import (
    BadSampleError,
    DatasetDescription,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.img2dataset import (
    UNFINISHED_OPTION,
    ChooseCaptions,
    ReadText,
    choose_alt_text,
    find_column,
    find_tars,
    read_tar_samples,
    split_tars,
)

CHOICES = ("top", "alt", "all")


def choose_top_caption(row: Mapping[str, Any], text: ReadText) -> Sequence[str | None]:
    """Choose the synthetic caption that CLIP ranks first."""
    found = find_column(row, ("top_caption",))
    if not isinstance(found, str):
        raise BadSampleError(
            "no caption: the metadata has no top_caption "
            "(download with save_additional_columns, or use caption=alt)"
        )
    return [found]


def choose_all_captions(row: Mapping[str, Any], text: ReadText) -> Sequence[str | None]:
    """Choose every synthetic caption once, the best one first."""
    found = find_column(row, ("all_captions",))
    if (
        not isinstance(found, Sequence)
        or isinstance(found, str)
        or not all(isinstance(c, str) for c in found)
    ):
        raise BadSampleError(
            "no caption: the metadata has no list all_captions "
            "(download with save_additional_columns, or use caption=alt)"
        )
    return [
        c for c in dict.fromkeys([*choose_top_caption(row, text), *found]) if c and c.strip()
    ] or [""]


_CAPTIONS: Mapping[str, ChooseCaptions] = {
    "top": choose_top_caption,
    "alt": choose_alt_text,
    "all": choose_all_captions,
}


def plan(inputs: Path, *, seed: int, unfinished: str, caption: str) -> DatasetDescription:
    """Make an input split of each tar.

    Raises:
        UsageError: there are no tars, or unfinished ones, or the choice is unknown.
    """
    if caption not in CHOICES:
        raise UsageError(
            f"caption={caption} is none of {', '.join(CHOICES)}.",
            "it says which text is used.",
            "choose one.",
        )
    splits, notes = split_tars(inputs, find_tars(inputs), unfinished)
    return DatasetDescription(("image",), splits, notes, {"caption": caption})


def raw_samples(
    inputs: Path, description: SplitDescription, *, unfinished: str, caption: str
) -> Iterator[RawSample]:
    """Read the samples of one tar."""
    return read_tar_samples(
        inputs, description, get_modality("image").required_parts["image"], _CAPTIONS[caption]
    )


SOURCE = Source(
    name="laion-coco",
    summary="LAION-COCO: tars, parquet and stats of img2dataset, with synthetic captions",
    plan=plan,
    raw_samples=raw_samples,
    options={
        "caption": Option(
            "top",
            "top: top_caption; alt: the alt text; all: all_captions as a list, of which each epoch "
            "reads one",
        ),
        "unfinished": UNFINISHED_OPTION,
    },
    licence="metadata CC-BY 4.0 (LAION); pictures under their owners' copyright",
    reads_as_stored=True,
)
