"""`onellm shards build coco | coco-karpathy IN OUT`: COCO's captions (paper: COCO Cap).

Each of a picture's five captions is a sample. `coco` reads captions_{train,val}{2017,2014}.json,
`coco-karpathy` reads Karpathy's dataset_coco.json (its `restval` belongs to train).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    AnnotationContext,
    AnnotationSet,
    require_text,
)
from onellm_dist.shards.sources.readers.coco_pictures import COCO_FOLDERS, find_coco_picture
from onellm_dist.shards.sources.readers.conversations import make_caption_turns
from onellm_dist.shards.sources.readers.json_stream import JsonItem

_LICENCE = "CC-BY 4.0 (captions); COCO's pictures under Flickr's terms"
_KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def _read_caption(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    caption, picture = require_text(row["caption"], "caption"), int(row["image_id"])
    return [
        AnnotatedSample(
            str(row["id"]),
            find_coco_picture(context, picture),
            make_caption_turns("image", caption),
            caption,
            {"image_id": picture},
        )
    ]


def _count_captions(row: Any, split: str) -> int:
    """Captions of a picture in the split. A malformed row counts in train, to be reported."""
    if not isinstance(row, dict) or row.get("split") not in _KARPATHY:
        return int(split == "train")
    if _KARPATHY[row["split"]] != split:
        return 0
    listed = row.get("sentences")
    return max(1, len(listed) if isinstance(listed, list) else 0)


def _read_picture(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    if row["split"] not in _KARPATHY:
        raise ValueError(f"its split is {row['split']!r}, not one of {', '.join(_KARPATHY)}")
    media, meta = find_coco_picture(context, int(row["cocoid"])), {"image_id": int(row["cocoid"])}
    texts = [(int(s["sentid"]), require_text(s["raw"], "a caption")) for s in row["sentences"]]
    return [
        AnnotatedSample(f"{number}", media, make_caption_turns("image", text), text, meta)
        for number, text in texts
    ]


SOURCES = tuple(
    s.make_source()
    for s in (
        AnnotationSet(
            "coco",
            "COCO's captions_{train,val}{2017,2014}.json and pictures; one sample per caption",
            "image",
            {
                s: tuple(
                    f"{f}captions_{s}{year}.json"
                    for year in (2017, 2014)
                    for f in ("annotations/", "", "coco/annotations/")
                )
                for s in ("train", "val")
            },
            _read_caption,
            key="annotations",
            medium=lambda row: row["image_id"],
            folders=COCO_FOLDERS,
            licence=_LICENCE,
        ),
        AnnotationSet(
            "coco-karpathy",
            "COCO's captions in Karpathy's splits (dataset_coco.json); one sample per caption",
            "image",
            dict.fromkeys(
                ("train", "val", "test"),
                (
                    "dataset_coco.json",
                    "karpathy/dataset_coco.json",
                    "annotations/dataset_coco.json",
                ),
            ),
            _read_picture,
            key="images",
            folders=COCO_FOLDERS,
            licence=_LICENCE,
            count=_count_captions,
        ),
    )
)
