"""`onellm shards build msrvtt | msrvtt-qa IN OUT`: MSR-VTT's captions and questions.

The prompts are the paper's (Table 10). `msrvtt` reads train_val_videodatainfo.json (its 7,010
videos: the reference trains on both parts) and test_videodatainfo.json; `msrvtt-qa` reads
{train,val,test}_qa.json. The videos are called `video0.mp4`, ..., in TrainValVideo/, TestVideo/ or
any of the usual folders.

One sample is one caption or question, as in the reference. A video is stored with each of its 20
captions and each question, which takes 20 times the videos' bytes. `join=true` stores it once, with
all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    AnnotationContext,
    AnnotationSet,
    require_text,
)
from onellm_dist.shards.sources.readers.conversations import (
    make_caption_turns,
    make_question,
    make_turns,
)
from onellm_dist.shards.sources.readers.json_stream import JsonItem

_FOLDERS = (
    "TrainValVideo",
    "TestVideo",
    "videos/all",
    "videos",
    "MSRVTT/videos/all",
    "all",
    "train-video",
    "test-video",
)
_LICENCE = "MSR-VTT: research only"


def _read_caption(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    caption = require_text(row["caption"], "caption")
    video = require_text(row["video_id"], "video_id")
    return [
        AnnotatedSample(
            f"{video}-{int(row['sen_id'])}",
            context.find_media("video", f"{video}.mp4"),
            make_caption_turns("video", caption),
            caption,
            {"video_id": video},
        )
    ]


def _read_question(context: AnnotationContext, item: JsonItem) -> Sequence[AnnotatedSample]:
    row = item.value
    question = make_question(require_text(row["question"], "question"))
    turns = make_turns((question, require_text(row["answer"], "answer")))
    video = f"video{int(row['video_id'])}"
    return [
        AnnotatedSample(
            str(row["id"]),
            context.find_media("video", f"{video}.mp4"),
            turns,
            meta={"video_id": video},
        )
    ]


SOURCES = tuple(
    s.make_source()
    for s in (
        AnnotationSet(
            "msrvtt",
            "MSR-VTT's {train_val,test}_videodatainfo.json and videos; one sample per caption",
            "video",
            {
                s: tuple(
                    f"{folder}{name}_videodatainfo.json"
                    for folder in ("", "annotation/", "annotations/", "videodatainfo/")
                )
                for s, name in (("train", "train_val"), ("test", "test"))
            },
            _read_caption,
            key="sentences",
            medium=lambda row: row["video_id"],
            folders=_FOLDERS,
            licence=_LICENCE,
        ),
        AnnotationSet(
            "msrvtt-qa",
            "MSRVTT-QA: {train,val,test}_qa.json and MSR-VTT's videos",
            "video",
            {
                s: tuple(f"{folder}{s}_qa.json" for folder in ("", "MSRVTT-QA/", "annotations/"))
                for s in ("train", "val", "test")
            },
            _read_question,
            medium=lambda row: row["video_id"],
            folders=_FOLDERS,
            licence=_LICENCE,
        ),
    )
)
