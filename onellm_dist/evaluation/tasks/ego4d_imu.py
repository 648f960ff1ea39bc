"""Captions of what a person with an IMU does."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.coco_captions import list_missing, make_caption_measure
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import ask_always

MEASURES = ("CIDEr", "ROUGE-L")

TASK = Task(
    name="ego4d-imu",
    title="Ego4D IMU",
    summary="Captions of motion, CIDEr and ROUGE-L.",
    modalities=("imu",),
    split="test",
    prompts={
        "paper": ask_always("Describe the motion."),
        "script": ask_always("Describe the scene."),
    },
    measure=make_caption_measure(MEASURES),
    max_new_tokens=64,
    paper={"CIDEr": 24.9, "ROUGE-L": 19.5},
    missing=lambda: list_missing(MEASURES),
)
