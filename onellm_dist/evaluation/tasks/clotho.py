"""Clotho 2.1: CIDEr and, where SPICE's files are, SPIDEr."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.coco_captions import list_missing, make_caption_measure
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_caption

MEASURES = ("CIDEr", "SPIDEr", "SPICE", "BLEU-4", "ROUGE-L")

TASK = Task(
    name="clotho",
    title="Clotho captions",
    summary="Captions of sounds, CIDEr and SPIDEr.",
    modalities=("audio",),
    split="evaluation",
    prompts=make_caption("audio"),
    measure=make_caption_measure(MEASURES),
    max_new_tokens=64,
    paper={"CIDEr": 29.1, "SPIDEr": 19.5},
    missing=lambda: list_missing(MEASURES),
)
