"""COCO's pictures by their number, which VQA, COCO captions and RefCOCO share."""

from __future__ import annotations

from pathlib import PurePosixPath

from onellm_dist.shards.sources.base import Media
from onellm_dist.shards.sources.readers.annotations import AnnotationContext

COCO_FOLDERS = ("coco", "images", "coco/images")
"""Where the pictures usually lie, relative to the input."""


def find_coco_picture(context: AnnotationContext, number: int) -> dict[str, Media]:
    """Find a picture of COCO by its number, of 2014 or 2017, train or val.

    Raises:
        MediaNotFetchedError: the picture is missing.
    """
    names = [f"train2017/{number:012d}.jpg", f"val2017/{number:012d}.jpg"]
    names += [f"{s}2014/COCO_{s}2014_{number:012d}.jpg" for s in ("train", "val")]
    flat = [PurePosixPath(n).name for n in names]
    return context.find_media("image", *names, *flat)
