"""Flickr30K in Karpathy's test split."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.coco_captions import list_missing, make_caption_measure
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_caption

MEASURES = ("CIDEr", "BLEU-4", "ROUGE-L")

TASK = Task(
    name="flickr30k",
    title="Flickr30K",
    summary="Captions of pictures, CIDEr.",
    modalities=("image",),
    split="test",
    prompts=make_caption("image"),
    measure=make_caption_measure(MEASURES),
    max_new_tokens=64,
    paper={"CIDEr": 78.6},
    missing=lambda: list_missing(MEASURES),
)
