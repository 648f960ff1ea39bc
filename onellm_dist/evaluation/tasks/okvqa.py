"""OK-VQA: soft accuracy of vqaEval.py; predictions are not lemmatised."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.vqa_accuracy import measure_official
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_short

TASK = Task(
    name="okvqa",
    title="OK-VQA",
    summary="Questions that need outside knowledge, soft accuracy.",
    modalities=("image",),
    split="val",
    prompts=make_short(),
    measure=measure_official,
    paper={"accuracy": 58.9},
)
