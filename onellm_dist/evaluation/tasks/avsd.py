"""AVSD of DSTC7: the last question of each dialogue, without the turns before it."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.coco_captions import list_missing, make_caption_measure
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_suffix

MEASURES = ("CIDEr", "BLEU-4", "ROUGE-L")

SENTENCE = "Answer the question and explain the reason in one sentence."

TASK = Task(
    name="avsd",
    title="AVSD (DSTC7)",
    summary="The last answer of dialogues about videos, CIDEr.",
    modalities=("video", "audio"),
    split="test",
    prompts={"paper": make_suffix(SENTENCE)},
    measure=make_caption_measure(MEASURES),
    max_new_tokens=64,
    paper={"CIDEr": 74.5},
    note="The challenge's program leaves out stop words first; here they count.",
    missing=lambda: list_missing(MEASURES),
)
