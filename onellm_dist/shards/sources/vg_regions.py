"""`onellm shards build vg IN OUT`: Visual Genome's region descriptions.

One sample is a picture with some of its regions. IN holds region_descriptions.json (108,077
pictures, 5.4M regions; read by byte range), image_data.json (the pictures' sizes), VG_100K/ and
VG_100K_2/. A region's prompt is the paper's (Table 10), with the box in shares of the picture's
width and height.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.shards.sources.base import Option
from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    AnnotationContext,
    AnnotationSet,
)
from onellm_dist.shards.sources.readers.conversations import make_region_prompt, make_turns
from onellm_dist.shards.sources.readers.json_stream import JsonItem
from onellm_dist.shards.sources.readers.media_files import get_write_stamp


@lru_cache(maxsize=1)
def _load_sizes(path: Path, stamp: int) -> Mapping[int, tuple[int, int]]:
    """Number of a picture to its (width, height)."""
    try:
        return {
            int(i.get("image_id", i.get("id"))): (int(i["width"]), int(i["height"]))
            for i in json.loads(path.read_bytes())
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OneLLMError(
            f"{path}: {error}",
            "boxes cannot be scaled.",
            "download the file again; it may be cut short.",
        ) from error


def _read_regions(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    number = int(row["id"] if "id" in row else row["image_id"])
    sizes = context.resolve_partner("image_data")
    size = _load_sizes(sizes, get_write_stamp(sizes)).get(number)
    if size is None:
        raise ValueError(f"image_data.json has no picture {number}")
    described = [r for r in row["regions"] if str(r["phrase"]).strip()]
    if not described:
        raise ValueError("no region has a phrase")
    most = int(context.options["regions"])
    chosen = (
        described
        if most < 1 or most >= len(described)
        else [described[i * len(described) // most] for i in range(most)]
    )
    turns = make_turns(
        *(
            (
                make_region_prompt(r["x"], r["y"], r["width"], r["height"], size),
                str(r["phrase"]).strip(),
            )
            for r in chosen
        )
    )
    names = [
        f"{folder}{number}.{e}" for e in ("jpg", "png") for folder in ("VG_100K/", "VG_100K_2/", "")
    ]
    return [
        AnnotatedSample(
            str(number), context.find_media("image", *names), turns, meta={"image_id": number}
        )
    ]


SOURCE = AnnotationSet(
    "vg",
    "Visual Genome's region_descriptions.json with VG_100K/ and VG_100K_2/",
    "image",
    {"train": ("region_descriptions.json", "annotations/region_descriptions.json")},
    _read_regions,
    folders=("vg", "images"),
    partners={
        "image_data": (
            "the pictures' sizes",
            {"train": ("image_data.json", "annotations/image_data.json")},
        )
    },
    options={
        "regions": Option(
            10, "regions per picture, spread evenly over its list; 0: all (about 50)", int
        )
    },
    licence="CC-BY 4.0",
).make_source()
