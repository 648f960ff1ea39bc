"""`onellm shards build refcoco | refcoco+ | refcocog IN OUT`: expressions that refer to a region.

One sample is an expression with its COCO picture. IN is the REFER tool's `data/`
(`refcoco/refs(unc).p`, `refcoco/instances.json`, `images/mscoco/images/train2014/`), or one
dataset's folder in it. The pickle is read by an unpickler that accepts plain values only. The
prompt is the paper's (Table 10), with the box in shares of the picture's width and height.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
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
    require_text,
)
from onellm_dist.shards.sources.readers.coco_pictures import find_coco_picture
from onellm_dist.shards.sources.readers.conversations import make_region_prompt, make_turns
from onellm_dist.shards.sources.readers.json_stream import JsonItem, scan_rows
from onellm_dist.shards.sources.readers.media_files import (
    get_write_stamp,
    require_file,
    resolve_below,
)
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.safe_pickle import load_plain

_REFS = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
_SPLITS = ("train", "val", "test", "testA", "testB")
_FOLDERS = ("images/mscoco/images", "images", "coco", "../images/mscoco/images")
"""Usual folders of the pictures; the last is right if IN is one dataset's folder."""
_ROWS = 1000


@lru_cache(maxsize=1)
def _load_refs(path: Path, stamp: int) -> list[Any]:
    """Load the pickle's list (RefCOCO: 50,000 rows).

    Raises:
        UsageError: the pickle does not hold a list.
    """
    refs = load_plain(path)
    if not isinstance(refs, list):
        raise UsageError(
            f"{path} holds a {type(refs).__name__}, not a list.",
            "a row is one expression's object.",
            "is it the right file?",
        )
    return refs


@lru_cache(maxsize=1)
def _load_instances(
    path: Path, stamp: int
) -> tuple[Mapping[int, Sequence[float]], Mapping[int, tuple[float, float]]]:
    """(object to its box [left, top, width, height], picture to (width, height))."""
    boxes = {
        int(r.value["id"]): tuple(float(v) for v in r.value["bbox"])
        for r in scan_rows(path, "annotations")
    }
    return boxes, {
        int(r.value["id"]): (float(r.value["width"]), float(r.value["height"]))
        for r in scan_rows(path, "images")
    }


def _count_expressions(ref: Any, split: str) -> int:
    """Expressions of a row in a split. A malformed row counts in train, to be reported."""
    if not isinstance(ref, dict) or ref.get("split") not in _SPLITS:
        return int(split == "train")
    if ref["split"] != split:
        return 0
    listed = ref.get("sentences")
    return max(1, len(listed) if isinstance(listed, list) else 0)


def _make_source(name: str) -> Source:
    def plan(
        inputs: Path,
        *,
        seed: int,
        refs: Path | None,
        instances: Path | None,
        media: Path | None,
        splits: str,
        missing: str,
    ) -> DatasetDescription:
        check_missing(missing)
        usual = [f"{folder}refs({by}).p" for by in _REFS[name] for folder in (f"{name}/", "")]
        rows = require_file(inputs, refs, usual, f"{name}'s expressions", "refs")
        boxes = require_file(
            inputs,
            instances,
            (f"{name}/instances.json", "instances.json"),
            f"{name}'s boxes",
            "instances",
        )
        find_media_folders(inputs, media, _FOLDERS)
        wanted = [s.strip() for s in splits.split(",")]
        if unknown := [s for s in wanted if s not in _SPLITS]:
            raise UsageError(
                f"splits={splits}: there is no split {unknown[0]}.",
                f"{name} does not have it.",
                f"use {', '.join(_SPLITS)}.",
            )
        return DatasetDescription(
            ("image",),
            _make_splits(
                _load_refs(
                    resolve_below(inputs, rows), get_write_stamp(resolve_below(inputs, rows))
                ),
                rows,
                boxes,
                wanted,
            ),
        )

    return Source(
        name,
        f"{name}: refs(...).p, instances.json and COCO's 2014 pictures; one sample per expression",
        plan=plan,
        raw_samples=_raw_samples,
        options={
            "refs": Option(
                None, f"the pickle of expressions, if it is not refs({_REFS[name][0]}).p", Path
            ),
            "instances": Option(None, "instances.json, if it is not beside the pickle", Path),
            "media": Option(
                None, "the folder that contains train2014/, if it is not a usual one", Path
            ),
            "splits": Option("train", f"what is built, separated by commas: {', '.join(_SPLITS)}"),
            "missing": MISSING_OPTION,
        },
        licence="RefCOCO: research only; COCO's pictures under Flickr's terms",
        reads_as_stored=True,
    )


def _make_splits(
    refs: list[Any], rows: str, boxes: str, splits: Sequence[str]
) -> Iterator[InputSplit]:
    for split in splits:
        for first in range(0, len(refs), _ROWS):
            count = sum(_count_expressions(r, split) for r in refs[first : first + _ROWS])
            yield InputSplit(
                f"{rows}:{first}",
                {"refs": rows, "instances": boxes, "first": first, "split": split},
                split,
                count,
            )


def _raw_samples(
    inputs: Path, description: SplitDescription, *, media: Path | None, missing: str, **options: Any
) -> Iterator[RawSample]:
    context = AnnotationContext(
        inputs, find_media_folders(inputs, media, _FOLDERS), description, options
    )
    path = resolve_below(inputs, description["refs"])
    refs = _load_refs(path, get_write_stamp(path))
    for number, ref in enumerate(
        refs[description["first"] : description["first"] + _ROWS], description["first"]
    ):
        planned = _count_expressions(ref, description["split"])
        if planned:
            item = JsonItem(f"{description['refs']}[{number}]", number, "", ref)
            yield from read_raw_samples(
                lambda i: _read_expressions(context, i), item, planned, missing
            )


def _read_expressions(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    ref = item.value
    if ref["split"] not in _SPLITS:
        raise ValueError(f"its split is {ref['split']!r}, not one of {', '.join(_SPLITS)}")
    instances = resolve_below(context.inputs, context.description["instances"])
    boxes, sizes = _load_instances(instances, get_write_stamp(instances))
    picture, box = int(ref["image_id"]), boxes.get(int(ref["ann_id"]))
    if box is None or picture not in sizes:
        raise ValueError(f"instances.json has no object {ref['ann_id']} or no picture {picture}")
    left, top, width, height = box
    prompt = make_region_prompt(left, top, width, height, sizes[picture])
    parts = find_coco_picture(context, picture)
    meta = {"image_id": picture, "ann_id": int(ref["ann_id"]), "ref_id": ref.get("ref_id")}
    expressions = [
        (int(s["sent_id"]), require_text(s.get("raw") or s["sent"], "an expression"))
        for s in ref["sentences"]
    ]
    return [
        AnnotatedSample(str(number), parts, make_turns((prompt, text)), meta=meta)
        for number, text in expressions
    ]


SOURCES = tuple(_make_source(name) for name in _REFS)
