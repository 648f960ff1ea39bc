"""`onellm shards build llava665k IN OUT`: LLaVA-1.5's llava_v1_5_mix665k.json.

Rows with a picture (rows=image) and rows without (rows=text) are two datasets, or one whose samples
list their media (rows=all): any number of pictures, where `<image>` stands in the text. IN
is LLaVA's `playground/data`: coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images,
vg/VG_100K, vg/VG_100K_2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.media import LISTED
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    AnnotationContext,
    find_media_folders,
    read_raw_samples,
)
from onellm_dist.shards.sources.readers.conversations import clean_turns, require_conversation
from onellm_dist.shards.sources.readers.json_scanner import JsonRow
from onellm_dist.shards.sources.readers.json_stream import JsonItem, read_rows, split_rows
from onellm_dist.shards.sources.readers.media_files import (
    list_picture_names,
    require_file,
    require_one_file,
)
from onellm_dist.shards.sources.readers.media_rows import read_media_row
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing

_ROWS = 1000
_ROW_TYPES = ("image", "text", "all")


def _get_row_type(row: Any) -> str:
    """Tell rows with pictures from rows of text; a malformed one counts as a picture's."""
    return "text" if isinstance(row, dict) and not row.get("image") else "image"


def plan(
    inputs: Path,
    *,
    seed: int,
    annotations: Path | None,
    media: Path | None,
    rows: str,
    missing: str,
) -> DatasetDescription:
    """Divide the rows with pictures, or those without, into ranges.

    Raises:
        UsageError: the file is missing, or an option is wrong.
    """
    check_missing(missing)
    if rows not in _ROW_TYPES:
        raise UsageError(
            f"rows={rows} is none of image, text, all.",
            "it says which rows become the dataset.",
            "choose one.",
        )
    name = require_file(
        inputs, annotations, ("llava_v1_5_mix665k.json",), "LLaVA's rows", "annotations"
    )
    find_media_folders(inputs, media, ())

    def count_samples(row: JsonRow) -> Mapping[str, int]:
        return {"train": int(rows in ("all", _get_row_type(row.value)))}

    if rows == "all":
        return DatasetDescription(
            ("image",),
            split_rows(inputs, name, _ROWS, count=count_samples),
            attributes=dict(LISTED),
        )
    built = "with a picture" if rows == "image" else "of text alone"
    other = f"only the rows {built} are built; the others: -o rows={_ROW_TYPES[rows == 'image']}"
    return DatasetDescription(
        ("image",) if rows == "image" else (),
        split_rows(inputs, name, _ROWS, count=count_samples),
        (other,),
    )


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    media: Path | None,
    rows: str,
    missing: str,
    **options: Any,
) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    context = AnnotationContext(inputs, find_media_folders(inputs, media, ()), description, options)
    for item in read_rows(inputs, description):
        if rows in ("all", _get_row_type(item.value)):
            yield from read_raw_samples(
                lambda i: read_conversation(context, i, rows), item, 1, missing
            )


def read_conversation(
    context: AnnotationContext, item: JsonItem, rows: str
) -> Sequence[AnnotatedSample]:
    """Make a sample of a row; its number is the key, because ids are not unique in this file."""
    row, key = item.value, f"{item.number:06d}"
    meta = {"id": str(row.get("id", ""))}
    if rows == "all":
        return [read_media_row(context, row, key, ("image",), meta)]
    if rows == "text":
        return [
            AnnotatedSample(key, {}, clean_turns(require_conversation(row), tags=False), meta=meta)
        ]
    name = require_one_file(row["image"], "image")
    # OCR-VQA's .gif are .jpg on most users' disks, and the list calls all of them .jpg.
    return [
        AnnotatedSample(
            key,
            context.find_media("image", *list_picture_names(name)),
            clean_turns(require_conversation(row)),
            meta={**meta, "image": name},
        )
    ]


SOURCE = Source(
    "llava665k",
    "LLaVA-1.5's llava_v1_5_mix665k.json: rows with a picture, without (rows=text), or all",
    plan=plan,
    raw_samples=raw_samples,
    options={
        "annotations": Option(None, "the file of rows, if it is not llava_v1_5_mix665k.json", Path),
        "media": Option(
            None,
            "the folder that holds coco/, gqa/, ocr_vqa/, textvqa/ and vg/, if it is not IN",
            Path,
        ),
        "rows": Option(
            "image",
            "image: rows with a picture; text: rows without (a dataset of text alone); all: both, "
            "with any number of pictures where <image> stands in the text",
        ),
        "missing": MISSING_OPTION,
    },
    licence="LLaVA: research only; pictures of COCO, GQA, OCR-VQA, TextVQA, Visual Genome",
    reads_as_stored=True,
)
