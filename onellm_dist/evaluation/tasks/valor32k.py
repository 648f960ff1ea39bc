"""VALOR-32K: clips that are seen and heard."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.coco_captions import list_missing, make_caption_measure
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_caption

MEASURES = ("CIDEr", "BLEU-4", "ROUGE-L")

TASK = Task(
    name="valor32k",
    title="VALOR-32K",
    summary="Captions of clips with sound, CIDEr.",
    modalities=("video", "audio"),
    split="test",
    prompts=make_caption("video"),
    measure=make_caption_measure(MEASURES),
    max_new_tokens=64,
    paper={"CIDEr": 29.2},
    missing=lambda: list_missing(MEASURES),
)
