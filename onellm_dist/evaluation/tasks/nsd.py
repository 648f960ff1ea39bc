"""Captions of pictures from the fMRI of who saw them."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.coco_captions import list_missing, make_caption_measure
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import ask_always, make_named

MEASURES = ("CIDEr", "ROUGE-L")

TASK = Task(
    name="nsd",
    title="NSD fMRI",
    summary="Captions from fMRI, CIDEr and ROUGE-L.",
    modalities=("fmri",),
    split="test",
    prompts={
        "paper": ask_always("Describe the scene based on fMRI data."),
        **make_named("script", "fMRI data"),
    },
    measure=make_caption_measure(MEASURES),
    max_new_tokens=64,
    paper={"CIDEr": 31.7, "ROUGE-L": 25.1},
    missing=lambda: list_missing(MEASURES),
)
