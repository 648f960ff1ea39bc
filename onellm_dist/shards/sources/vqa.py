"""`onellm shards build vqav2 | okvqa | gqa | aokvqa | ocrvqa IN OUT`: questions about pictures.

The prompts are the paper's (Table 10). Besides the pictures, IN holds:

| source | annotations (for the split train) | one sample is |
|---|---|---|
| vqav2 | v2_OpenEnded_mscoco_train2014_questions.json, | a question with the most common of |
| | v2_mscoco_train2014_annotations.json | its ten answers |
| okvqa | OpenEnded_mscoco_train2014_questions.json, | the same |
| | mscoco_train2014_annotations.json | |
| gqa | train_balanced_questions.json | a question |
| aokvqa | aokvqa_v1p0_train.json | a question with four options and a letter as answer |
| ocrvqa | dataset.json | a book cover with all its questions |

COCO's pictures may be those of 2014 (`train2014/COCO_train2014_000000000009.jpg`) or of 2017
(`train2017/000000000009.jpg`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from onellm_dist.common.errors import OneLLMError
from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    AnnotationContext,
    AnnotationSet,
    require_text,
)
from onellm_dist.shards.sources.readers.coco_pictures import COCO_FOLDERS, find_coco_picture
from onellm_dist.shards.sources.readers.conversations import (
    find_most_common,
    get_option_letter,
    make_choice_question,
    make_question,
    make_turns,
)
from onellm_dist.shards.sources.readers.json_stream import JsonItem
from onellm_dist.shards.sources.readers.media_files import (
    get_write_stamp,
    list_picture_names,
)

_BOOK_SPLITS = {1: "train", 2: "val", 3: "test"}


@lru_cache(maxsize=2)
def _load_questions(path: Path, stamp: int) -> Mapping[int, str]:
    """Question number to its text (VQAv2 train: 443,757)."""
    try:
        listed = json.loads(path.read_bytes())["questions"]
        return {int(q["question_id"]): str(q["question"]) for q in listed}
    except (ValueError, KeyError, TypeError) as error:
        raise OneLLMError(
            f"{path}: {error}",
            "the text of the questions is missing.",
            "download the file again; it may be cut short.",
        ) from error


def _read_vqa(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    number = int(row["question_id"])
    questions = context.resolve_partner("questions")
    text = _load_questions(questions, get_write_stamp(questions)).get(number)
    if text is None:
        raise ValueError(f"there is no question {number}")
    given = [answer for a in row["answers"] if (answer := str(a["answer"]).strip())]
    answer = row.get("multiple_choice_answer") or find_most_common(given)
    turns = make_turns((make_question(text), require_text(answer, "multiple_choice_answer")))
    meta = {"question_id": number, "image_id": int(row["image_id"]), "answers": given}
    return [
        AnnotatedSample(
            f"{number}", find_coco_picture(context, int(row["image_id"])), turns, meta=meta
        )
    ]


def _read_gqa(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    turns = make_turns(
        (
            make_question(require_text(row["question"], "question")),
            require_text(row["answer"], "answer"),
        )
    )
    return [
        AnnotatedSample(
            item.key,
            context.find_media("image", f"{row['imageId']}.jpg"),
            turns,
            meta={"image_id": str(row["imageId"])},
        )
    ]


def _read_aokvqa(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    options = [require_text(c, "a choice") for c in row["choices"]]
    right = int(row["correct_choice_idx"])
    if not 0 <= right < len(options):
        raise ValueError(f"correct_choice_idx is {right} of {len(options)} choices")
    turns = make_turns(
        (
            make_choice_question(require_text(row["question"], "question"), options),
            get_option_letter(right),
        )
    )
    meta = {
        "question_id": str(row["question_id"]),
        "choices": options,
        "answers": list(row.get("direct_answers", [])),
    }
    meta["rationales"] = list(row.get("rationales", []))
    return [
        AnnotatedSample(
            str(row["question_id"]),
            find_coco_picture(context, int(row["image_id"])),
            turns,
            meta=meta,
        )
    ]


def _count_covers(row: Any, split: str) -> int:
    """1 if the cover belongs to the split. A malformed row counts in train, to be reported."""
    return int(
        (_BOOK_SPLITS.get(row.get("split", 0)) if isinstance(row, dict) else "train") == split
    )


def _read_ocrvqa(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row, key = item.value, item.key
    questions, answers = row["questions"], row["answers"]
    if not questions or len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions and {len(answers)} answers")
    pairs = [
        (make_question(require_text(q, "a question")), require_text(str(a), "an answer"))
        for q, a in zip(questions, answers, strict=True)
    ]
    suffix = PurePosixPath(str(row.get("imageURL", ""))).suffix or ".jpg"
    names = list_picture_names(f"{key}{suffix}")  # LLaVA's users converted the .gif to .jpg
    meta = {k: row[k] for k in ("title", "authorName", "genre") if row.get(k)}
    return [
        AnnotatedSample(key, context.find_media("image", *names), make_turns(*pairs), meta=meta)
    ]


def _make_vqa_set(name: str, called: str, prefix: str, licence: str) -> AnnotationSet:
    """Make a dataset in VQA's format: a file of questions and a file of annotations."""
    splits = ("train", "val")
    return AnnotationSet(
        name,
        f"{called}: VQA's files of questions and annotations, COCO's pictures",
        "image",
        {
            s: (
                f"{prefix}mscoco_{s}2014_annotations.json",
                f"annotations/{prefix}mscoco_{s}2014_annotations.json",
            )
            for s in splits
        },
        _read_vqa,
        key="annotations",
        folders=COCO_FOLDERS,
        medium=lambda row: row["image_id"],
        partners={
            "questions": (
                "the file of questions",
                {
                    s: tuple(
                        f"{folder}{prefix}OpenEnded_mscoco_{s}2014_questions.json"
                        for folder in ("", "questions/", "annotations/")
                    )
                    for s in splits
                },
            )
        },
        licence=licence,
    )


SOURCES = tuple(
    s.make_source()
    for s in (
        _make_vqa_set(
            "vqav2", "VQAv2", "v2_", "CC-BY 4.0 (annotations); COCO's pictures under Flickr's terms"
        ),
        _make_vqa_set(
            "okvqa", "OK-VQA", "", "CC-BY 4.0 (annotations); COCO's pictures under Flickr's terms"
        ),
        AnnotationSet(
            "gqa",
            "GQA: {train,val}_balanced_questions.json and images/",
            "image",
            {
                s: (f"{s}_balanced_questions.json", f"questions/{s}_balanced_questions.json")
                for s in ("train", "val")
            },
            _read_gqa,
            medium=lambda row: row["imageId"],
            folders=("images", "gqa/images"),
            licence="CC-BY 4.0",
        ),
        AnnotationSet(
            "aokvqa",
            "A-OKVQA: aokvqa_v1p0_{train,val}.json, COCO's pictures",
            "image",
            {
                s: (f"aokvqa_v1p0_{s}.json", f"aokvqa/aokvqa_v1p0_{s}.json")
                for s in ("train", "val")
            },
            _read_aokvqa,
            medium=lambda row: row["image_id"],
            folders=COCO_FOLDERS,
            licence="CC-BY 4.0 (annotations); COCO's pictures under Flickr's terms",
        ),
        AnnotationSet(
            "ocrvqa",
            "OCR-VQA: dataset.json and images/; one sample is a book cover with all questions",
            "image",
            dict.fromkeys(_BOOK_SPLITS.values(), ("dataset.json",)),
            _read_ocrvqa,
            count=_count_covers,
            folders=("images", "ocr_vqa/images"),
            licence="OCR-VQA: research only",
        ),
    )
)
