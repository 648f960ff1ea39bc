"""Captions of Objaverse's point clouds, PointLLM's split, by COCO's program as in the reference."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.coco_captions import list_missing, make_caption_measure
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_caption

MEASURES = ("BLEU-1", "ROUGE-L", "METEOR", "CIDEr")

TASK = Task(
    name="objaverse-caption",
    title="Objaverse captions",
    summary="Captions of point clouds, BLEU-1, ROUGE-L, METEOR.",
    modalities=("point",),
    split="val200",
    prompts=make_caption("point cloud"),
    measure=make_caption_measure(MEASURES),
    max_new_tokens=64,
    paper={"BLEU-1": 42.2, "ROUGE-L": 45.3, "METEOR": 20.3},
    missing=lambda: list_missing(MEASURES),
)
